"""How alike two texts are: vectors, pairs with scores, pairs that find each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from tasks_made import SIGNALS, answered, asked, check_parts_change_nothing, examples_of, made, reread, sentences, trained
from tiny_bases import save_bert, save_gpt2, tokenizer

from afina.errors import ConfigError, DataError
from afina.tasks.baselines import word_overlap
from afina.tasks.in_batch import Texts, ranking_losses, step_gradients
from afina.tasks.passages import numbered, passages_in
from afina.tasks.pooling import find_pooling, pooled
from afina.tasks.retrieval import figures_of, of_query, ranking
from afina.tasks.sentence_similarity import SentenceSimilarity
from afina.tasks.word_search import WordSearch
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare

NAME = "sentence_similarity"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)  # before any test has its own
    return save_bert(tmp_path_factory.mktemp("similarity"))


def pairs_of(count):
    """Two texts with the same telling word belong together."""
    texts = {word: [] for word in SIGNALS}
    for text, (word,) in sentences(count * 4):
        texts[word].append(text)
    pairs = [{"text": a, "text_pair": b} for some in texts.values() for a, b in zip(some[::2], some[1::2], strict=False)]
    return sorted(pairs, key=lambda pair: pair["text"])[:count]


def scored(count):
    pairs = pairs_of(2 * count)
    rows = []
    for i in range(count):
        first, other = pairs[i], pairs[-1 - i]
        second = first["text_pair"] if i % 2 else other["text_pair"]
        same = next(w for w in SIGNALS if w in first["text"].split()) in second.split()
        rows.append({"text": first["text"], "text_pair": second, "label": "5" if same else "0"})
    return rows


# --- T25: parts of a step, of which each pair is to find its own among all of the step


@pytest.mark.parametrize("rows", [pairs_of(17), scored(17)], ids=["pairs", "scores"])
def test_t25_parts_change_neither_loss_nor_gradients(base, tmp_path, rows):
    check_parts_change_nothing(NAME, base, rows, tmp_path)


@pytest.mark.xdist_group("two processes")
def test_t25_two_processes_and_two_parts_train_what_one_trains(base, tmp_path):
    """The last step has one pair, so that one process has none of its own."""
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in pairs_of(32))
    recipe = Recipe(
        task={"name": NAME}, model=str(base), data=DataOptions(file=str(tmp_path / "rows.jsonl")),
        method={"name": "lora", "r": 3, "target_modules": "all-linear"},
        training=TrainingOptions(epochs=1, batch_size=7, learning_rate=5e-3, precision="fp32"),
    )  # fmt: skip
    run = prepare(recipe, tmp_path / "one")
    assert len(run.rows["train"].features) % 7 == 1
    run.execute()
    (tmp_path / "pairs").mkdir()
    recipe.training.gradient_accumulation = 2
    (tmp_path / "pairs" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(Path(__file__).with_name("two_processes_worker.py")), str(tmp_path),
        ],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [
        [line["loss"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]
        for folder in (tmp_path / "one", tmp_path / "pairs" / "two")
    ]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-6)


def test_t25_the_law_can_fail(base, tmp_path, monkeypatch):
    """Without what parts tell each other, negatives would be those of the part alone, and the loss smaller."""
    monkeypatch.setattr(SentenceSimilarity, "parts_share", False)
    with pytest.raises(AssertionError):
        check_parts_change_nothing(NAME, base, pairs_of(17), tmp_path)


def drawn(seed, *shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_what_is_no_wrong_answer_is_left_out():
    """Dropping by hand what answers the same query gives the same loss."""
    first, second, wrong = drawn(1, 4, 5), drawn(2, 4, 5), drawn(3, 3, 5)
    # rows 0 and 2 share the passage, 0 and 3 the query; the first wrong passage is right for query 2, the last is query 2
    texts = Texts(
        torch.tensor([1, 2, 3, 1]), torch.tensor([11, 12, 11, 14]),
        torch.tensor([[11, 14], [12, 15], [11, -1], [11, 14]]), torch.tensor([15, 16, 2]),
    )  # fmt: skip
    scores = first @ torch.cat([second, wrong]).T / 0.1
    there = {0: [0, 1, 4, 5, 6], 1: [1, 0, 2, 3, 5], 2: [2, 1, 3, 4, 5, 6], 3: [3, 1, 4, 5, 6]}
    back = {0: [0, 1], 1: [1, 0, 2, 3], 2: [2, 1], 3: [3, 1, 2]}
    losses = ranking_losses(first, second, wrong, texts, 0.1)
    for i in range(4):
        one = torch.logsumexp(scores[i, there[i]], 0) - scores[i, i]
        other = torch.logsumexp(scores[back[i], i], 0) - scores[i, i]
        torch.testing.assert_close(losses[i], (one + other) / 2)


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 2, 3, 1)])
def test_t25_the_gradients_of_a_step_are_those_of_its_loss(sizes):
    queries, passages, wrong = drawn(1, 7, 5), drawn(2, 7, 5), drawn(3, 4, 5)
    numbers = Texts(torch.arange(7), 100 + torch.arange(7), 100 + torch.arange(7)[:, None], torch.tensor([7, 8, 9, 103]))
    live = [v.clone().requires_grad_() for v in (queries, passages, wrong)]
    ranking_losses(*live, numbers, 0.1).sum().backward()
    ends = np.cumsum([0, *sizes])
    parts = [Texts(numbers.queries[a:b], numbers.passages[a:b], numbers.right[a:b], numbers.negatives[:0])
             for a, b in pairwise(ends)]  # fmt: skip
    joined = Texts.joined([*parts[:-1], Texts(parts[-1].queries, parts[-1].passages, parts[-1].right, numbers.negatives)])
    losses, gradients = step_gradients(queries, passages, wrong, joined, 0.1)
    torch.testing.assert_close(losses, ranking_losses(queries, passages, wrong, numbers, 0.1))
    for found, vectors in zip(gradients, live, strict=True):
        torch.testing.assert_close(found, vectors.grad)


@pytest.mark.parametrize("count", [2, 5])
def test_t25_parts_with_dropout_send_the_gradient_of_what_they_saw(tmp_path, count):
    """The second pass draws what the first one drew: by hand, all parts are kept and go back together."""
    config = tf.BertConfig(
        vocab_size=len(tokenizer()), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29,
        max_position_embeddings=61, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, initializer_range=0.2,
    )  # fmt: skip
    tf.BertModel(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    task, model, rows = made(NAME, tmp_path, with_wrong(11))
    model.train()
    parts = [task.collate([rows.features[i] for i in range(k, 11, count)]) for k in range(count)]
    chance = torch.get_rng_state()
    kept = [task._apart(model, part) for part in parts]
    texts = Texts.joined([Texts(p["queries"], p["passages"], p["right"], p["negatives"]) for p in parts])
    expected = ranking_losses(*(torch.cat([k[kind] for k in kept]) for kind in range(3)), texts, 0.05).sum()
    expected.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    torch.set_rng_state(chance)
    task.share(model, parts, lambda own: [own], 0)
    losses = [task.loss_sum(model, part) for part in parts]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(sum(losses).detach(), expected.detach())
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, wanted[n], rtol=1e-4, atol=1e-6)
    for part in parts:
        del part["chance"]
    model.zero_grad()
    sum(task.loss_sum(model, part) for part in parts).backward()
    assert any(not torch.allclose(p.grad, wanted[n], rtol=1e-2) for n, p in model.named_parameters() if p.requires_grad)


# --- search


def test_places_are_those_of_sorting():
    scores, numbers = np.array([0.5, 0.9, 0.1, 0.7, 0.7, 0.2]), np.array([3, 5, 7, 11, 13, 17])
    found = ranking(scores, numbers, [11, 7], [5])
    assert found.places.tolist() == [1.5, 5]  # 13 is as good as 11; 5 is not there
    assert found.ranks == {11: 1.5, 7: 4}
    assert found.wrong == 13
    alike = ranking(np.ones(7), np.arange(7), [2])
    assert alike.places.tolist() == [4.0]


def test_figures_of_search_are_those_of_scikit_learn():
    of = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed").ndcg_score
    chance, places, expected = np.random.default_rng(0), [], []
    for _ in range(23):
        scores, right = chance.normal(size=37), chance.choice(37, 3, replace=False)
        places.append(ranking(scores, np.arange(37), right).places)
        expected.append(of([np.isin(np.arange(37), right).astype(float)], [scores], k=10))
    made = figures_of(places)
    assert made["ndcg_at_10"] == pytest.approx(np.mean(expected))
    assert made["queries"] == 23
    assert of_query(np.array([2.0, 11.0]))[1:] == [0.5, 0.0, 0.5, 0.5]
    assert of_query(np.array([11.0, 12.0])) == [0.0] * 5
    for key in ("ndcg_at_10", "mrr_at_10", "recall_at_1", "recall_at_5", "recall_at_10"):
        low, high = made[f"{key}_interval"]
        assert low <= made[key] <= high


def test_intervals_of_search_hold_the_truth():
    """Of 200 samples of a known share, about 95 % of the intervals hold it."""
    chance, held = np.random.default_rng(3), 0
    for _ in range(200):
        hits = chance.random(50) < 0.7
        low, high = figures_of([np.array([1.0 if hit else 99.0]) for hit in hits])["recall_at_1_interval"]
        held += low <= 0.7 <= high
    assert 180 <= held <= 199


def test_words_are_searched_for_as_the_formula_says():
    passages = ["a red wine", "a red red car and a wheel", "a sea", ""]
    found, mean = WordSearch(passages).scores("red wheel red"), (3 + 7 + 2) / 4
    for i, text in enumerate(passages):
        words, expected = text.split(), 0.0
        for word, times in (("red", 2), ("wheel", 1)):
            n, f = sum(word in p.split() for p in passages), words.count(word)
            rare = np.log(1 + (4 - n + 0.5) / (n + 0.5))
            expected += times * rare * f / (f + 1.2 * (0.25 + 0.75 * len(words) / mean)) if f else 0.0
        assert found[i] == pytest.approx(expected)


def with_wrong(count):
    """Every third row has no wrong passage, the others one or two of them."""
    pairs, rows = pairs_of(2 * count), []
    for i, pair in enumerate(pairs[:count]):
        wrong = [pairs[-1 - i]["text_pair"], pairs[count + i // 2]["text"]][: i % 3]
        rows.append({**pair, "negatives": json.dumps(wrong)})
    return rows


def test_t25_parts_with_wrong_passages_change_neither_loss_nor_gradients(base, tmp_path):
    check_parts_change_nothing(NAME, base, with_wrong(17), tmp_path)


@torch.no_grad()
def test_wrong_passages_are_candidates_and_make_the_lesson_harder(base):
    rows = with_wrong(11)
    task, model, encoded = made(NAME, base, rows)
    plain, _, bare = made(NAME, base, [{k: v for k, v in row.items() if k != "negatives"} for row in rows])
    assert float(task.loss_sum(model, task.collate(encoded.features))) > float(
        plain.loss_sum(model, plain.collate(bare.features))
    )
    answers = answered(task, model, encoded)
    assert [len(a) for a in answers] == [2 + i % 3 for i in range(11)]
    figures = task.metrics(answers, encoded.examples)
    assert figures["candidates"] == len({t for row in numbered(encoded.examples).rows for t in row[1:]}) > 11
    batch = task.collate(encoded.features)
    for i, row in enumerate(encoded.examples):
        alone = asked(task, model, task.encode(examples_of(NAME, [{"text": t} for t in row.value]), None, 61).features)
        assert np.concatenate(alone) == pytest.approx(answers[i], abs=1e-5)
    assert batch["owner"].tolist() == [i for i in range(11) for _ in range(i % 3)]


def test_search_is_among_all_passages_and_told_row_by_row(base):
    """By hand, from the vectors: every query against every passage of the side."""
    rows = with_wrong(7)
    rows[4]["text"] = rows[3]["text"]  # one query with two right passages
    task, model, encoded = made(NAME, base, rows)
    answers, known = answered(task, model, encoded), numbered(encoded.examples)
    vectors = {t: v for row, own in zip(known.rows, answers, strict=True) for t, v in zip(row, own, strict=True)}
    passages = sorted({t for row in known.rows for t in row[1:]})
    places = {}
    for row, right in zip(known.rows, known.right, strict=True):
        order = sorted((t for t in passages if t != row[0]), key=lambda t: -float(vectors[row[0]] @ vectors[t]))
        places[row[0]] = np.array([order.index(t) + 1.0 for t in sorted(right, key=order.index)])
    assert len(places) == 6
    assert max(map(len, places.values())) == 2
    figures = task.metrics(answers, encoded.examples)
    assert {k: v for k, v in figures.items() if k in task.figures and k != "loss"} == pytest.approx(
        {k: v for k, v in figures_of(list(places.values())).items() if k in task.figures}
    )
    for said, row in zip(task.tabled(answers, encoded.examples), known.rows, strict=True):
        before = [t for t in passages if t not in {row[0], *known.right[known.rows.index(row)]}
                  and float(vectors[row[0]] @ vectors[t]) > float(vectors[row[0]] @ vectors[row[1]])]  # fmt: skip
        assert float(said["rank"]) == 1 + len(before)
        assert said["found"] in known.texts
    found = task.baselines(encoded, encoded)["word_search"]
    assert set(task.of_pairs) - {"loss"} <= set(found)


def test_the_cells_of_wrong_passages():
    assert passages_in('["a ", " ", "b"]') == ("a", "b")
    assert passages_in("[sic] a text") == ("[sic] a text",)
    assert passages_in("") == ()
    with pytest.raises(ValueError, match=r"the negatives hold 7; expected a text or a list"):
        passages_in('["a", 7]')


def test_a_right_passage_of_another_row_is_not_held_against_its_query(base):
    rows = [{"text": "w1", "text_pair": "w2"}, {"text": "W1", "text_pair": "w3", "negatives": '["w2", "w5"]'},
            {"text": "w4", "text_pair": "w6"}]  # fmt: skip
    task, _, _ = made(NAME, base, rows)
    encoded = task.encode(examples_of(NAME, rows), None, 61)
    assert encoded.notes == [
        "1 row names a right passage of the same query among the wrong ones; it is not held against the query (line 3)"
    ]
    assert encoded.features[0]["right"] == encoded.features[1]["right"]
    with pytest.raises(DataError, match="learn from the score alone"):
        made(NAME, base, [{**row, "label": str(i)} for i, row in enumerate(rows)])


# --- learning


def test_pairs_are_memorised(base, tmp_path):
    task, model, rows = made(NAME, base, pairs_of(31))
    before = task.metrics(answered(task, model, rows), rows.examples)
    trained(task, model, rows, tmp_path, epochs=80, batch_size=31)
    after = task.metrics(answered(task, model, rows), rows.examples)
    assert after["mrr_at_10"] > max(0.9, before["mrr_at_10"] + 0.1)
    assert after["recall_at_1"] <= after["recall_at_5"] <= after["recall_at_10"] <= 1
    assert after["candidates"] == len({row["text_pair"] for row in pairs_of(31)})
    assert set(task.figures) <= set(after)


def test_scores_are_memorised_in_their_unit(base, tmp_path):
    task, model, rows = made(NAME, base, scored(31))
    trained(task, model, rows, tmp_path, epochs=25)
    answers = answered(task, model, rows)
    assert task.metrics(answers, rows.examples)["spearman"] > 0.8
    said = task.respond(answers[0], rows.examples[0])
    assert said["score"] == pytest.approx(5 * said["similarity"])
    assert list(task.columns(answers[0], rows.examples[0])) == ["answer", "similarity"]
    again = reread(task, base)
    again.load_model(str(base))
    for a, b in zip(asked(again, model, rows.features[:3]), asked(task, model, rows.features[:3]), strict=True):
        assert np.array_equal(a, b)
    assert again.respond(answers[0], rows.examples[0]) == said


def test_the_loss_of_several_pools_is_that_of_each(base, monkeypatch):
    task, model, rows = made(NAME, base, with_wrong(23))
    answers, figures = answered(task, model, rows), {}
    for pool in (1000, 10):
        monkeypatch.setattr("afina.tasks.sentence_similarity.POOL", pool)
        figures[pool] = task.metrics(answers, rows.examples)
    parts = [task.metrics(answers[i::3], rows.examples[i::3]) for i in range(3)]
    assert figures[10]["loss"] == pytest.approx(sum(p["loss"] * p["rows"] for p in parts) / 23)
    assert figures[10]["ndcg_at_10"] == pytest.approx(figures[1000]["ndcg_at_10"])
    assert figures[10]["candidates"] == figures[1000]["candidates"]


# --- vectors


def test_a_vector_depends_on_its_own_text_alone(base):
    task, model, rows = made(NAME, base, pairs_of(11))
    together = asked(task, model, rows.features)
    for feature, pair in zip(rows.features, together, strict=True):
        assert asked(task, model, [feature])[0] == pytest.approx(pair, abs=1e-5)
        assert np.linalg.norm(pair, axis=1) == pytest.approx([1, 1], abs=1e-5)
    alone = examples_of(NAME, [{"text": rows.examples[3].value[0]}])
    features = task.encode(alone, None, 61).features
    (vector,) = asked(task, model, features)
    assert vector == pytest.approx(together[3][:1], abs=1e-5)
    mixed = asked(task, model, [rows.features[0], features[0], rows.features[1]])
    assert [len(m) for m in mixed] == [2, 1, 2]
    assert mixed[2] == pytest.approx(together[1], abs=1e-5)
    said = task.columns(vector, alone[0])
    assert json.loads(said["answer"]) == task.respond(vector, alone[0])["vector"] == pytest.approx(vector[0], abs=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_pooling_reads_tokens_and_no_padding(pooling):
    hidden, lengths = torch.randn(3, 7, 5), [7, 2, 4]
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])
    for i, n in enumerate(lengths):
        tokens = hidden[i, :n]
        expected = {"mean": tokens.mean(0), "cls": tokens[0], "last": tokens[-1], "max": tokens.amax(0)}[pooling]
        found = pooled(hidden, mask, pooling)[i]
        torch.testing.assert_close(found, expected / expected.norm())
    ahead = torch.cat([torch.randn(3, 2, 5), hidden], dim=1)  # what prompt tuning puts in front
    torch.testing.assert_close(pooled(ahead, mask, pooling), pooled(hidden, mask, pooling))


def test_pooling_is_what_the_folder_says(base, tmp_path):
    config = tf.AutoConfig.from_pretrained(base)
    assert find_pooling(str(base), config) == "mean"
    gpt2 = save_gpt2(tmp_path / "gpt2")
    assert find_pooling(str(gpt2), tf.AutoConfig.from_pretrained(gpt2)) == "last"
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"path": f"{i}_{k}" if i else "", "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)]
    place = save_bert(tmp_path / "said")
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "1_Pooling").mkdir()

    def says(content):
        (place / "1_Pooling" / "config.json").write_text(json.dumps(content))
        return find_pooling(str(place), config)

    assert says({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}) == "cls"
    assert says({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 24}) == "mean"
    assert says({"pooling_mode_lasttoken": True}) == "last"
    assert says({"pooling_mode": "lasttoken"}) == "last"
    for names in (["weightedmean_tokens"], ["cls_token", "mean_tokens"]):
        with pytest.raises(ConfigError, match="pools by"):
            says({f"pooling_mode_{name}": True for name in names})
    (place / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": "x.Dense"}]))
    with pytest.raises(ConfigError, match=r"pass through a Dense module.*task\.pooling=mean"):
        find_pooling(str(place), config)
    task, model, rows = made(NAME, place, pairs_of(5), pooling="max")
    assert task.pooling == "max"
    assert len(asked(task, model, rows.features)) == 5


def test_an_encoder_with_a_decoder_is_read_by_its_encoder(base, tmp_path):
    place = save_bert(tmp_path)
    for file in place.glob("*.safetensors"):
        file.unlink()
    tf.T5Model(
        tf.T5Config(
            vocab_size=len(tokenizer()), d_model=24, d_kv=12, d_ff=29, num_layers=1, num_heads=2, pad_token_id=0,
            decoder_start_token_id=0,
        )
    ).save_pretrained(place)  # fmt: skip
    task, model, rows = made(NAME, place, pairs_of(5))
    assert type(model.get_base_model()).__name__ == "T5EncoderModel"
    assert np.shape(asked(task, model, rows.features)) == (5, 2, 24)


# --- rows


def test_rows_that_lack_a_text_are_dropped_and_texts_may_be_asked_alone():
    make = SentenceSimilarity.kind.make
    assert make({"text": "a", "text_pair": ""}, 2).text == make({"text": "", "text_pair": "b"}, 2).text == ""
    alone = make({"text": "a"}, 2)
    assert (alone.text, alone.value) == ("a", ("a", None))
    with pytest.raises(ValueError, match="'entailment' is no number"):
        make({"text": "a", "text_pair": "b", "label": "entailment"}, 2)
    with pytest.raises(DataError, match=r"no second text \(line 2\); name its column with data\.text_pair"):
        SentenceSimilarity.learn([alone], [])


def test_t27_pairs_of_one_first_text_stay_together():
    rows = examples_of(NAME, [{"text": "A  b", "text_pair": "c"}, {"text": "a b", "text_pair": "d"}])
    assert rows[0].group == rows[1].group != ""


def test_scores_are_there_for_all_rows_or_none(base):
    rows = scored(5)
    del rows[3]["label"]
    with pytest.raises(DataError, match=r"1 of 5 rows have no score \(line 5\)"):
        SentenceSimilarity.learn(examples_of(NAME, rows), [])
    same = [{**row, "label": "1"} for row in rows]
    with pytest.raises(DataError, match="the score is 1 in every training row; leave the column out"):
        SentenceSimilarity.learn(examples_of(NAME, same), [])
    with pytest.raises(DataError, match=r"task\.objective=scores: there is no column of scores"):
        made(NAME, base, pairs_of(3), objective="scores")
    with pytest.raises(ConfigError, match=r"task\.temperature=0\.1 belongs to pairs without scores"):
        made(NAME, base, scored(5), temperature=0.1)
    task, model, encoded = made(NAME, base, scored(5))
    with pytest.raises(DataError, match=r"1 of 5 rows have no score \(line 5\)"):
        task.metrics(answered(task, model, encoded), examples_of(NAME, rows))
    task, _, encoded = made(NAME, base, scored(5), objective="pairs", temperature=0.1)
    assert set(task.figures) == set(SentenceSimilarity.of_pairs)
    assert "labels" not in task.collate(encoded.features)


@pytest.mark.parametrize(
    ("low", "high", "middle"), [("0", "1", 0.5), ("-1", "1", 0.5), ("1", "5", -0.125), ("0.2", "0.9", 0.5)]
)
def test_scores_that_are_cosines_stay_as_they_are(base, low, high, middle):
    """Others are brought to 0 and 1 by the range of the training rows."""
    rows = [{"text": "w1", "text_pair": "w2", "label": low}, {"text": "w3", "text_pair": "w4", "label": high}]
    task, _, _ = made(NAME, base, rows)
    assert task._cosine("0.5") == pytest.approx(middle)


def test_both_texts_are_cut_and_counted_once(base):
    long = " ".join(f"w{i}" for i in range(30))
    task, _, _ = made(NAME, base, pairs_of(3))
    encoded = task.encode(examples_of(NAME, [{"text": long, "text_pair": long}, {"text": "w1", "text_pair": "w2"}]), 9, 61)
    assert encoded.truncated == 1
    assert [len(f["input_ids"]) for f in encoded.features] == [9, 3]
    assert [len(f["pair_ids"]) for f in encoded.features] == [9, 3]


def test_overlap_of_words_is_that_of_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text", reason="scikit-learn is not installed")
    texts = ["red wine glass", "red red car", "blue sea", "sky"]
    theirs = text.TfidfVectorizer(binary=True).fit(texts).transform(texts).toarray()
    ours = word_overlap(texts, texts)
    assert ours @ ours.T == pytest.approx(theirs @ theirs.T, abs=1e-6)


def test_what_makes_no_vector_is_not_adapted(base):
    """The pooler's output is never read: nothing of it could learn, and several processes would wait for its gradient."""
    task, model, rows = made(NAME, base, pairs_of(5))
    assert task.idle(model.get_base_model()) == ["pooler.dense"]
    task.loss_sum(model, task.collate(rows.features)).backward()
    trained_ones = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained_ones
    assert not [n for n, p in trained_ones.items() if p.grad is None or "pooler" in n]


def test_arrays_have_a_row_for_each_answer(base):
    task, model, rows = made(NAME, base, pairs_of(5))
    answers = answered(task, model, rows)
    found = task.arrays([answers[0], None, *answers[1:]])
    assert {name: array.shape for name, array in found.items()} == {"text": (6, 24), "text_pair": (6, 24)}
    assert np.isnan(found["text"][1]).all()
    assert np.array_equal(found["text_pair"][2], answers[1][1])
    assert list(task.arrays([answers[0][:1]])) == ["text"]
    with pytest.raises(ConfigError, match="no vectors"):
        made("regression", base, [{"text": "w1", "label": "1"}, {"text": "w2", "label": "2"}])[0].arrays([1.0])
