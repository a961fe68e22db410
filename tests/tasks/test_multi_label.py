"""Any number of labels a text, none included."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tasks_made import answered, asked, check_parts_change_nothing, examples_of, made, reread, sentences, trained
from tiny_bases import save_bert

from afina.errors import DataError
from afina.tasks.multi_label_classification import MultiLabelClassification, best_threshold, labels_of

NAME = "multi_label_classification"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)  # before any test has its own
    return save_bert(tmp_path_factory.mktemp("several"))


def rows_of(count):
    return [{"text": t, "label": json.dumps(s)} for t, s in sentences(count, signals=3)]


def test_t25_parts_change_neither_loss_nor_gradients(base, tmp_path):
    check_parts_change_nothing(NAME, base, rows_of(37), tmp_path)


def test_t25_weights_of_labels_count_as_targets(base):
    """With a weight of 1 each nothing changes; a label of weight 3 counts three times, in the loss and in its divisor."""
    task, model, encoded = made(NAME, base, rows_of(13))
    batch = task.collate(encoded.features)
    plain, targets = task.loss_sum(model.eval(), batch), task.targets_in(batch)
    assert targets == 13 * len(task.labels)
    task.class_weights = [1.0] * len(task.labels)
    assert task.loss_sum(model, batch) == plain
    task.class_weights = [3.0, *[1.0] * (len(task.labels) - 1)]
    assert task.targets_in(batch) == targets + 2 * float(batch["labels"][:, 0].sum())
    yes = batch["labels"][:, 0] > 0
    one = torch.nn.functional.binary_cross_entropy_with_logits(
        task.logits(model, batch)[yes, 0], batch["labels"][yes, 0], reduction="sum"
    )
    torch.testing.assert_close(task.loss_sum(model, batch), plain + 2 * one)


def test_loss_is_that_of_its_definition_with_smoothing(base):
    task, model, encoded = made(NAME, base, rows_of(7))
    batch = task.collate(encoded.features)
    p = torch.sigmoid(task.logits(model.eval(), batch))
    for smoothing in (0.0, 0.2):
        task.label_smoothing = smoothing
        aimed = batch["labels"] * (1 - smoothing) + smoothing / 2
        expected = -(aimed * p.log() + (1 - aimed) * (1 - p).log()).sum()
        torch.testing.assert_close(task.loss_sum(model, batch), expected)


def test_a_tiny_model_memorises(base, tmp_path):
    task, model, encoded = made(NAME, base, rows_of(31))
    trained(task, model, encoded, tmp_path, epochs=50)
    answers = answered(task, model, encoded)
    figures = task.metrics(answers, encoded.examples)
    assert figures["subset_accuracy"] > 0.9
    assert any(e.label == "[]" for e in encoded.examples)
    assert figures["subset_accuracy"] == np.mean([task.right(a, e) for a, e in zip(answers, encoded.examples, strict=True)])
    for answer, example in zip(answers, encoded.examples, strict=True):
        said, names = task.columns(answer, example), task.respond(answer, example)["labels"]
        assert said["answer"] == (", ".join(names) or "[]")
        assert names == [n for n in task.labels if float(said[f"p({n})"]) >= 0.5]


# --- labels in a file


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ('["fear", "surprise"]', ["fear", "surprise"]),
        ("[]", []),
        (" [ ] ", []),
        ("b, a ,b", ["a", "b"]),
        ("b;a", ["a", "b"]),
        ("a|b c", ["a", "b c"]),
        ("one", ["one"]),
        ("two  words", ["two words"]),
        ("[3, 1]", ["1", "3"]),
    ],
)
def test_labels_in_a_cell(cell, names):
    assert labels_of(cell) == names


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("a; b, c", "holds semicolons and commas; separate labels by one alone"),
        ("a,,b", "holds an empty label"),
        (",", "holds an empty label"),
        ('["a", ""]', "holds an empty label"),
        ('["a, b"]', "label 'a, b' holds a comma"),
        ('["a"', "is no list of labels"),
        ('[["a"]]', "is no list of labels"),
        ("[true]", "is no list of labels"),
    ],
)
def test_labels_that_cannot_be_told_apart(cell, said):
    with pytest.raises(ValueError, match=said):
        MultiLabelClassification.kind.make({"text": "w1", "label": cell}, 3)


def test_an_empty_list_is_an_answer_and_an_empty_cell_is_none():
    assert examples_of(NAME, [{"text": "w1", "label": "[]"}])[0].label == "[]"
    assert examples_of(NAME, [{"text": "w1", "label": ""}])[0].label == ""
    assert examples_of(NAME, [{"text": "w1"}])[0].label == ""


def test_two_separators_in_one_file_are_refused():
    rows = [{"text": "w1", "label": "a;b"}, {"text": "w2", "label": "a"}, {"text": "w3", "label": "gas, water"}]
    with pytest.raises(DataError, match=r"(?s)line 4 by commas: 'gas, water'.*Use one of them"):
        MultiLabelClassification.learn(examples_of(NAME, rows), [])
    rows[2]["label"] = '["a", "b"]'
    assert MultiLabelClassification.learn(examples_of(NAME, rows), []) == {"labels": ["a", "b"]}


def test_what_cannot_be_learned_is_refused(base):
    some = examples_of(NAME, [{"text": "w1", "label": "a"}, {"text": "w2", "label": "[]"}])
    with pytest.raises(DataError, match="no training row has the label 'c'"):
        MultiLabelClassification.learn(some, examples_of(NAME, [{"text": "w3", "label": "c"}]))
    with pytest.raises(DataError, match="no row has any label"):
        MultiLabelClassification.learn(some[1:], [])
    task, _, _ = made(NAME, base, rows_of(7))
    with pytest.raises(DataError, match="labels the model does not know: c"):
        task.metrics([np.zeros(len(task.labels))], examples_of(NAME, [{"text": "w3", "label": "c"}]))


# --- thresholds and temperature


def test_a_threshold_has_the_best_f1_there_is():
    chance = np.random.default_rng(0)
    for _ in range(31):
        truth = chance.random(53) < 0.3
        p = np.clip(chance.normal(0.2 + 0.2 * truth, 0.15), 0, 1).round(2)
        thresholds = np.append(np.linspace(0.001, 1, 997), best_threshold(p, truth))
        f1 = [2 * (truth & (p >= t)).sum() / ((p >= t).sum() + truth.sum()) for t in thresholds]
        assert f1[-1] == pytest.approx(max(f1))


def test_few_rows_choose_no_threshold():
    p = np.linspace(0, 1, 20)
    assert best_threshold(p, p > 0.79) == 0.5
    assert best_threshold(p, p > 0.17) == 0.5
    assert best_threshold(p, p > 0.6) == pytest.approx(0.6, abs=0.05)


def test_what_is_chosen_is_kept_and_changes_no_order(base, tmp_path):
    rows = rows_of(61)
    task, model, encoded = made(NAME, base, rows, thresholds="tuned", calibrate=True)
    trained(task, model, encoded, tmp_path, epochs=4)
    before = answered(task, model, encoded)
    usual = task.metrics(before, encoded.examples)
    assert task.settles
    task.learned |= task.settle(before, encoded.examples)
    assert set(task.learned) == {"labels", "temperature", "thresholds"}
    after = answered(task, model, encoded)
    tuned = task.metrics(after, encoded.examples)
    for a, b in zip(np.stack(before).T, np.stack(after).T, strict=True):
        assert (a.argsort() == b.argsort()).all()
    assert tuned["macro_f1"] >= usual["macro_f1"] - 1e-9
    assert tuned["calibration"]["after"]["loss"] <= tuned["calibration"]["before"]["loss"] + 1e-9
    assert tuned["calibration"]["before"]["loss"] == pytest.approx(usual["loss"], abs=1e-6)
    again = reread(task, base)
    same = asked(again, model, encoded.features[:5])
    assert np.array_equal(same, asked(task, model, encoded.features[:5]))
    assert again.respond(same[0], encoded.examples[0]) == task.respond(same[0], encoded.examples[0])
    assert not made(NAME, base, rows[:7])[0].settles


def test_baselines(base):
    task, _, encoded = made(NAME, base, rows_of(97))
    found = task.baselines(encoded, encoded)
    assert found["word_counts"]["mean_average_precision"] > found["frequencies"]["mean_average_precision"] + 0.3
    assert found["frequencies"]["per_class"]["late"]["roc_auc"] == 0.5


def test_a_single_label_column_trains_too(base):
    """Files in which every row has one label are read as they stand."""
    task, _, encoded = made(NAME, base, [{"text": f"w{i} late", "label": "ab"[i % 2]} for i in range(9)])
    assert task.labels == ["a", "b"]
    assert task.encode(encoded.examples, None, 61).notes == []
    several = examples_of(NAME, [{"text": "w1", "label": "a;b"}, {"text": "w2", "label": "[]"}])
    notes = task.encode(several, None, 61).notes
    assert notes == ["labels are separated by semicolons", "1 row without any label, which is an answer too"]
    assert encoded.features[1]["label"] == [0.0, 1.0]
