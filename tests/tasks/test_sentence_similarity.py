"""How alike two texts are: vectors, pairs with scores, pairs that find each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from tasks_made import SIGNALS, answered, asked, check_parts_change_nothing, examples_of, made, reread, sentences, trained
from tiny_bases import save_bert, save_gpt2, tokenizer

from afina.errors import ConfigError, DataError
from afina.tasks.baselines import word_overlap
from afina.tasks.in_batch import ranking_losses, ranks, step_loss
from afina.tasks.pooling import find_pooling, pooled
from afina.tasks.sentence_similarity import SentenceSimilarity
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


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 2, 3, 1)])
def test_t25_the_parts_of_a_step_add_up(sizes):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(2, 7, 5, generator=generator, dtype=torch.double), dim=-1)
    texts = torch.tensor([[i, 100 + min(i, 5)] for i in range(7)])  # the last two have the same second text
    whole = vectors.clone().requires_grad_()
    total = ranking_losses(whole[0], whole[1], texts, 0.1).sum()
    total.backward()
    losses, gradients, place = [], [], 0
    for size in sizes:
        own = vectors[:, place : place + size].clone().requires_grad_()
        loss = step_loss(own, vectors, place, texts, 0.1)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(own.grad)
        place += size
    torch.testing.assert_close(sum(losses), total.detach())
    torch.testing.assert_close(torch.cat(gradients, dim=1), whole.grad)


def test_what_is_no_wrong_answer_is_left_out():
    """Dropping the others of the same text by hand gives the same loss and the same rank."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.nn.functional.normalize(torch.randn(2, 4, 5, generator=generator), dim=-1)
    texts = torch.tensor([[1, 11], [2, 12], [3, 11], [1, 14]])  # 0 and 2 share the second text, 0 and 3 the first
    scores = first @ second.T / 0.1
    rows = {0: [0, 1], 1: [1, 0, 2, 3], 2: [2, 1, 3], 3: [3, 1, 2]}
    losses, places = ranking_losses(first, second, texts, 0.1), ranks(first, second, texts)
    for i, kept in rows.items():
        there = torch.logsumexp(scores[i, kept], 0) - scores[i, i]
        back = torch.logsumexp(scores[kept, i], 0) - scores[i, i]
        torch.testing.assert_close(losses[i], (there + back) / 2)
        assert places[i] == 1 + (scores[i, kept] > scores[i, i]).sum()


def test_vectors_that_are_all_equal_have_the_mean_rank():
    same = torch.ones(7, 3) / 3**0.5
    texts = torch.arange(14).reshape(7, 2)
    assert ranks(same, same, texts).tolist() == [4.0] * 7


# --- learning


def test_pairs_are_memorised(base, tmp_path):
    task, model, rows = made(NAME, base, pairs_of(31))
    before = task.metrics(answered(task, model, rows), rows.examples)
    trained(task, model, rows, tmp_path, epochs=80, batch_size=31)
    after = task.metrics(answered(task, model, rows), rows.examples)
    assert after["mrr"] > max(0.9, before["mrr"] + 0.1)
    assert after["recall_at_1"] <= after["recall_at_5"] <= after["recall_at_10"] <= 1
    assert after["candidates"] == 31
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


def test_ranks_in_several_pools_are_those_of_each(base, monkeypatch):
    task, model, rows = made(NAME, base, pairs_of(23))
    answers = answered(task, model, rows)
    monkeypatch.setattr("afina.tasks.sentence_similarity.POOL", 10)
    parts = [task.metrics(answers[i::3], rows.examples[i::3]) for i in range(3)]
    whole = task.metrics(answers, rows.examples)
    assert whole["candidates"] == 8
    assert whole["mrr"] == pytest.approx(sum(p["mrr"] * p["rows"] for p in parts) / 23)
    assert task.baselines(rows, rows)["word_overlap"]["candidates"] == 8


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
