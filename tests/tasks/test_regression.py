"""A number a text: in the unit of the file, whatever it is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from tasks_made import SIGNALS, answered, asked, check_parts_change_nothing, examples_of, made, reread, sentences, trained
from tiny_bases import save_bert, save_gpt2

from afina.errors import DataError, Problems
from afina.tasks.baselines import word_ridge
from afina.tasks.regression import Regression, number_in
from afina.training.recipe import Recipe, TrainingOptions


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)  # before any test has its own
    return save_bert(tmp_path_factory.mktemp("regression"))


def rows_of(count, *, scale=1.0, shift=0.0):
    return [{"text": t, "label": f"{shift + scale * SIGNALS.index(s[0]):.6g}"} for t, s in sentences(count)]


def test_t25_parts_change_neither_loss_nor_gradients(base, tmp_path):
    check_parts_change_nothing("regression", base, rows_of(37), tmp_path)


@pytest.mark.parametrize("save", [save_bert, save_gpt2])
def test_a_tiny_model_memorises_in_the_unit_of_the_file(tmp_path, save):
    rows = rows_of(31, scale=700.0, shift=-12_000.0)
    task, model, encoded = made("regression", save(tmp_path / "base"), rows)
    trained(task, model, encoded, tmp_path / "run", epochs=30)
    answers = answered(task, model, encoded)
    figures = task.metrics(answers, encoded.examples)
    assert figures["r2"] > 0.95
    assert figures["loss"] == pytest.approx(figures["mse"] / np.var([float(r["label"]) for r in rows]))
    assert -13_000 < min(answers) < max(answers) < -7_000
    again = reread(task, tmp_path / "base")
    assert asked(again, model, encoded.features[:3]) == asked(task, model, encoded.features[:3])
    assert task.columns(answers[0], encoded.examples[0]) == {"answer": f"{answers[0]:.6g}"}


def test_the_unit_changes_no_training(base, tmp_path):
    """Metres or millimetres: the same losses, and answers a thousand times as large."""
    seen = []
    for scale in (1.0, 1000.0):
        lines = []
        task, model, encoded = made("regression", base, rows_of(23, scale=scale))
        trained(task, model, encoded, tmp_path / str(scale), lines.append, epochs=2)
        seen.append(([x["loss"] for x in lines if "loss" in x], np.asarray(answered(task, model, encoded))))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-4)
    assert seen[0][1] * 1000 == pytest.approx(seen[1][1], rel=1e-3)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("3,7", r"'3,7' is no number; is the comma a decimal one\? Write 3\.7"),
        ("high", "'high' is no number$"),
        ("nan", "expected a finite one"),
        ("inf", "expected a finite one"),
        ("1_000", "is no number"),
        ("1,000,000", "is no number$"),
        ("12 kg", "is no number"),
    ],
)
def test_what_is_no_number(cell, said):
    with pytest.raises(ValueError, match=said):
        number_in(cell)
    with pytest.raises(ValueError, match="is no number"):
        Regression.kind.make({"text": "w1", "label": cell}, 3)


@pytest.mark.parametrize("cell", ["0", "-1.5", "2e3", "+4", " 7 ", "007"])
def test_what_is_a_number(cell):
    assert number_in(cell) == float(cell)
    assert Regression.kind.make({"text": "w1", "label": cell}, 3).label == cell


def test_a_number_that_never_varies_is_refused():
    with pytest.raises(DataError, match="is 3 in every training row"):
        Regression.learn(examples_of("regression", [{"text": f"w{i}", "label": "3.0"} for i in range(5)]), [])


def test_texts_to_answer_need_no_number(base):
    task, model, _ = made("regression", base, rows_of(11))
    features = task.encode(examples_of("regression", [{"text": "w1 late"}]), None, 61).features
    assert "label" not in features[0]
    assert len(asked(task, model, features)) == 1


def test_baselines(base):
    task, _, encoded = made("regression", base, rows_of(97))
    found = task.baselines(encoded, encoded)
    assert found["mean"]["r2"] == pytest.approx(0.0, abs=1e-9)
    assert found["word_counts"]["r2"] > 0.8  # the telling word is counted


def test_ridge_is_the_solution_of_its_equations():
    """Against the same problem, written down whole."""
    sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    texts, targets = ["a b", "b c", "c a c", "d", "a"], np.array([1.0, 2.0, 4.0, 0.5, 3.0])
    terms = sorted({t for x in texts for t in (*x.split(), *(f"{a} {b}" for a, b in pairwise(x.split())))})
    x = np.array([[float(t in f" {text} ".split() or f" {t} " in f" {text} ") for t in terms] for text in texts])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    whole = sklearn.Ridge(alpha=1.0, fit_intercept=False).fit(x, targets - targets.mean())
    assert word_ridge(texts, targets, texts) == pytest.approx(whole.predict(x) + targets.mean())
    assert word_ridge(texts, targets, ["unseen"]) == pytest.approx([targets.mean()])


def test_head_is_one_output_and_nothing_else_is_new(base):
    task, model, _ = made("regression", base, rows_of(11))
    assert model.config.problem_type == "regression"
    batch = task.collate(task.encode(examples_of("regression", [{"text": "w1"}, {"text": "w2 w3"}]), None, 61).features)
    assert task.outputs(model, batch).shape == torch.Size([2])


@pytest.mark.parametrize("name", ["regression", "sentence_similarity"])
def test_an_option_that_would_do_nothing_is_refused(name):
    problems = Problems("the recipe")
    Recipe(task={"name": name}, training=TrainingOptions(label_smoothing=0.1)).check(problems)
    assert problems.found == [f"training.label_smoothing=0.1: {name} has no classes to spread a target over; leave it out"]


def test_a_figure_that_is_not_there_chooses_nothing(base, tmp_path, monkeypatch):
    """R² and correlations are None where nothing varies; the smallest loss decides then."""
    task, model, encoded = made("regression", base, rows_of(11))
    told = []
    figures = task.metrics
    monkeypatch.setattr(task, "metrics", lambda answers, examples: {**figures(answers, examples), "r2": None})
    trained(task, model, encoded, tmp_path, told.append, epochs=3, best="r2", learning_rate=3e-3)
    losses = [line["validation_loss"] for line in told if "validation_loss" in line]
    best = [line["best"] for line in told if "validation_loss" in line]
    assert best == [i == 0 or loss < min(losses[:i]) for i, loss in enumerate(losses)]
