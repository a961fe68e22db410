"""Reading one text and writing another: what encoder and decoder get, the loss, what is written, whole runs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from language_bases import SEQ2SEQ, features_of, rows_of, save, t5_like, task_of
from tasks_made import gradient, made

from afina.errors import ConfigError, DataError, MissingDependencyError
from afina.tasks import text_metrics
from afina.tasks.task import IGNORED, Rows
from afina.tasks.text_metrics import first_sentence, most_similar, overlap_figures, translation_figures
from afina.tasks.writing import Written
from afina.training.loop import make_engine, predict
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun

SHARED = Path(__file__).parents[3] / "shared" / "data"
PAIRS = [
    {"text": "Name seven fruits.", "label": "red, and where they grow"},
    {"text": "the dog is small", "label": "el gos és petit"},
    {"text": "Why?", "label": "No."},
    {"text": "What is the capital of Norway? Say it in one word, and say why.", "label": "Oslo"},
    {"text": "think of 13 dogs", "label": "quick brown lazy dogs, and a fox that jumps over them"},
]


@pytest.fixture(scope="module", params=SEQ2SEQ)
def base(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("base") / request.param, request.param)


def losses(task, model, features):
    batch = task.collate(features)
    return task.loss_sum(model, batch), task.targets_in(batch)


# --- what encoder and decoder get


def test_the_decoder_reads_the_target_one_place_later(base):
    task, model, rows = made("seq2seq", base, PAIRS, source_prefix="say: ")
    for feature, row in zip(rows.features, PAIRS, strict=True):
        target, read = feature["labels"], feature["decoder_ids"]
        assert read == [model.config.decoder_start_token_id, *target[:-1]]
        assert task.tokenizer.decode(target, skip_special_tokens=True) == row["label"]
        assert task.tokenizer.decode(feature["input_ids"], skip_special_tokens=True) == f"say: {row['text']}"
        assert target[-1] == feature["input_ids"][-1] == task.tokenizer.eos_token_id
    assert rows.lengths == [len(f["input_ids"]) + len(f["labels"]) for f in rows.features]
    batch = task.collate(rows.features)
    theirs = model.get_base_model()
    shifted = theirs.prepare_decoder_input_ids_from_labels(batch["labels"])
    aimed = batch["labels"] != IGNORED
    assert torch.equal(batch["decoder_input_ids"][aimed], shifted[aimed])


def test_a_row_that_is_asked_has_no_targets(base):
    task, _, _ = made("seq2seq", base, PAIRS)
    for feature, whole in zip(
        features_of(task, [{"text": row["text"]} for row in PAIRS]).features, features_of(task, PAIRS).features, strict=True
    ):
        assert feature == {key: whole[key] for key in ("input_ids", "row")}


def test_t5_has_no_end_of_positions_and_bart_has(base):
    task, model, _ = made("seq2seq", base, PAIRS)
    task.tokenizer.model_max_length = 31
    assert task.limit(model) == (127 if "BART" in str(base) else 1_000_000)
    made_of_long = features_of(task, [{"text": "fox " * 60, "label": "dog"}], limit=task.limit(model))
    assert made_of_long.max_length == 31  # what the tokenizer was made for, where nothing else is said
    assert made_of_long.truncated == 1


def test_a_model_without_a_start_token_is_refused(tmp_path):
    folder = save(tmp_path / "base", "T5")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content["decoder_start_token_id"] = None
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="decoder_start_token_id"):
        task_of("seq2seq", t5_like(), PAIRS).load_model(str(folder))


def test_a_target_without_a_token_is_refused(base):
    task, _, _ = made("seq2seq", base, PAIRS)
    with pytest.raises(DataError, match=r"line 2.*no token"):
        features_of(task, [{"text": "Why?", "label": "</s>"}])


# --- the loss


@torch.no_grad()
def test_a_batch_is_the_sum_of_its_rows_and_what_transformers_says(base):
    task, model, rows = made("seq2seq", base, PAIRS)
    model.eval()
    whole, count = losses(task, model, rows.features)
    alone = [losses(task, model, [feature]) for feature in rows.features]
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(whole, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-4)
    theirs = 0.0
    for feature in rows.features:
        labels = torch.tensor([feature["labels"]])
        theirs += float(model(input_ids=torch.tensor([feature["input_ids"]]), labels=labels).loss) * labels.numel()
    assert float(whole) == pytest.approx(theirs, rel=1e-4)


def test_t25_parts_of_a_step_change_neither_loss_nor_gradient(base, tmp_path):
    """transformers' Trainer makes four times the loss of four parts, for both architectures."""
    rows = [*PAIRS, *({"text": f"Say {'fox ' * n}", "label": "dog " * (n + 1)} for n in range(4))]
    loss, moved = gradient("seq2seq", base, rows, tmp_path / "1", 1)
    for count in (2, 4, 8):
        other, changes = gradient("seq2seq", base, rows, tmp_path / str(count), count)
        assert other == pytest.approx(loss, rel=1e-5)
        for name, change in moved.items():
            torch.testing.assert_close(changes[name], change, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_figures_are_those_of_all_targets_together(base):
    task, model, rows = made("seq2seq", base, PAIRS)
    answers = predict(model, task, rows, 2, make_engine("fp32"), exact=True)
    figures = task.metrics(answers, rows.examples)
    loss, count = losses(task, model.eval(), rows.features)
    assert figures["tokens"] == count
    assert figures["loss"] == pytest.approx(float(loss) / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert "bleu" not in figures
    shown = task.outputs(model, task.collate(rows.features))
    assert float(-shown.log().mean()) == pytest.approx(figures["loss"], rel=1e-5)


# --- writing


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_writes_what_each_row_writes_alone(base, beams):
    task, model, _ = made("seq2seq", base, PAIRS, max_new_tokens=11, num_beams=beams)
    rows = features_of(task, [{"text": row["text"]} for row in PAIRS]).features
    together = [a.text for a in task.final_answers(model.eval(), task.collate(rows))]
    assert together == [task.final_answers(model, task.collate([row]))[0].text for row in rows]
    assert len(set(together)) > 1


def test_rows_that_ask_the_same_are_references_of_one_answer(base):
    task, _, _ = made("seq2seq", base, PAIRS)
    rows = [("Thanks!", "Gràcies!"), ("thanks!", "Moltes gràcies!"), ("Why?", "Per què?")]
    examples = rows_of("seq2seq", [{"text": source, "label": target} for source, target in rows])
    figures = task.metrics([Written(text="Moltes gràcies!"), Written(text="Moltes gràcies!"), Written(text="No.")], examples)
    assert figures["written"] == 2
    assert figures["rouge1"] == figures["rouge_l"] == 0.5
    expected = translation_figures(["Moltes gràcies!", "No."], [["Gràcies!", "Moltes gràcies!"], ["Per què?"]])
    assert figures["bleu"] == expected["bleu"]


def test_figures_of_texts():
    assert overlap_figures(["a b c d"], [["a b c d"]]) == {"rouge1": 1, "rouge2": 1, "rouge_l": 1, "exact_match": 1}
    assert overlap_figures(["És això"], [["és  AIXÒ"]])["exact_match"] == 1
    accents = overlap_figures(["è à"], [["e a"]])
    assert accents["rouge1"] == 0
    some = overlap_figures(["the dog is small"], [["the small dog"]])
    assert some["rouge1"] == pytest.approx(2 * 3 / 7)
    assert some["rouge_l"] == pytest.approx(2 * 2 / 7)
    same = translation_figures(["el gos és molt petit"], [["el gos és molt petit"]])
    assert same == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    assert translation_figures(["el gos"], [["la guineu salta"]])["bleu"] < 5


def test_answers_that_need_no_model():
    assert first_sentence("It is so. And more. ") == "It is so."
    assert first_sentence("v1.2 has no end") == "v1.2 has no end"
    known = ["the fox jumps", "the dog is lazy", "the fruit is red"]
    assert most_similar(known, ["a lazy dog", "red fruit of the tree", "the fox", "nothing alike"]) == [1, 2, 0, 0]


def test_baselines_are_measured_as_the_model_is(base):
    task, _, rows = made("seq2seq", base, PAIRS)
    test = rows_of("seq2seq", [{"text": "the dog is small. It barks.", "label": "the dog is small."}])
    found = task.baselines(rows, Rows(test, features_of(task, [{"text": e.text, "label": e.label} for e in test]).features))
    assert found["first_sentence"]["rouge1"] == 1
    assert found["source"]["rouge1"] == pytest.approx(2 * 4 / 10)
    assert found["most_similar"]["rouge1"] == overlap_figures(["el gos és petit"], [["the dog is small."]])["rouge1"]
    assert "loss" not in found["most_similar"]
    assert found["frequencies"]["loss"] > 0
    assert all(figures["title"] for figures in found.values())


def test_libraries_that_are_absent_are_told_before_the_run(base, monkeypatch):
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'afina\[text\]'"):
        task_of("seq2seq", t5_like(), PAIRS)
    task_of("seq2seq", t5_like(), PAIRS, generate=False)


# --- whole runs


def memorised(tmp_path, architecture, rows, columns, **task):
    folder = tmp_path / "data"
    folder.mkdir()
    for side in ("train", "validation", "test"):
        with (folder / f"{side}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    base = save(tmp_path / "base", architecture)
    recipe = Recipe(
        task={"name": "seq2seq", **task},
        model=str(base),
        data=DataOptions(file=str(folder)),
        method={"name": "lora", "r": 16, "lora_alpha": 32, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        training=TrainingOptions(
            epochs=120, batch_size=16, learning_rate=1e-2, precision="fp32", evaluate_every=30.0, weight_decay=0.0
        ),
    )
    recipe.data.clean.duplicates, recipe.data.clean.near_duplicates = False, "ignore"
    return prepare(recipe, tmp_path / "run").execute()


def own_rows():
    subjects = ["fox", "dog", "gos", "capital", "sentence", "fruit", "Oslo", "Norway"]
    asked = ["Why is the {}?", "Name the {}.", "think of {}", "say {} in red"]
    said = ["red", "small, and lazy", "No.", "it is 13", "over the sea", "brown dogs", "where they grow"]
    return [(question.format(subject), said[(3 * i + 5 * k) % 7]) for i, subject in enumerate(subjects)
            for k, question in enumerate(asked)]  # fmt: skip


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_thirty_two_rows_are_memorised(architecture, tmp_path):
    rows = own_rows()
    metrics = memorised(tmp_path, architecture, rows, ("source", "target"), max_new_tokens=29)
    best = max(metrics["baselines"][name]["rouge_l"] for name in ("source", "first_sentence", "untuned"))
    assert metrics["test"]["rouge_l"] > 0.95 > 0.5 > best
    assert metrics["test"]["bleu"] > 90
    assert metrics["test"]["loss"] < 0.3 < metrics["baselines"]["frequencies"]["loss"]
    trained = TrainedRun.load(tmp_path / "run")
    examples = trained.examples([{"text": source} for source, _ in rows[:9]])
    answers = [trained.task.respond(a, e)["answer"] for a, e in zip(trained.answers(examples), examples, strict=True)]
    assert sum(answer == target for answer, (_, target) in zip(answers, rows, strict=False)) >= 8


@pytest.mark.skipif(not (SHARED / "translation").is_dir(), reason="../shared/data/translation is absent")
def test_thirty_two_real_translations_are_memorised(tmp_path):
    """Some of them have several right answers, so not all tokens can be foretold."""
    with (SHARED / "translation" / "eng_cat.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:33]
    metrics = memorised(tmp_path, "BART", rows, ("source", "target"), max_new_tokens=29)
    assert len({source.casefold() for source, _ in rows}) == metrics["test"]["written"] < 32
    assert metrics["test"]["chrf"] > 90 > 40 > metrics["baselines"]["source"]["chrf"]
