"""One temperature: it makes the validation rows likeliest, mends confidence, and never changes an answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tasks_made import answered, asked, made, reread, sentences, trained
from tiny_bases import save_bert

from afina.tasks.calibration import as_two_classes, calibration_error, compared, fit_temperature, tempered


def drawn(rows, classes, temperature, seed=0):
    """Probabilities that are `temperature` times as sure as they should be, and targets drawn from the true ones."""
    chance = np.random.default_rng(seed)
    scores = chance.normal(0, 1.7, (rows, classes))
    true = tempered(np.exp(scores), 1.0)
    targets = np.array([chance.choice(classes, p=row) for row in true])
    return tempered(true, 1 / temperature), targets


@pytest.mark.parametrize(("classes", "temperature"), [(2, 2.5), (7, 2.0), (3, 0.5), (5, 1.0)])
def test_the_temperature_is_found_again(classes, temperature):
    rows = 4001
    probabilities, targets = drawn(rows, classes, temperature)
    found = fit_temperature(probabilities, targets)
    assert found == pytest.approx(temperature, rel=0.12)
    figures = compared(tempered(probabilities, found), targets, found)
    assert figures["after"]["loss"] <= figures["before"]["loss"] + 1e-12
    assert figures["after"]["calibration_error"] < 0.04
    if temperature != 1.0:
        assert figures["after"]["calibration_error"] < figures["before"]["calibration_error"] / 2
        assert figures["after"]["loss"] < figures["before"]["loss"]
    assert figures["before"]["loss"] == pytest.approx(-np.log(probabilities[np.arange(rows), targets]).mean())


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0, 10.0])
def test_no_temperature_changes_an_order(temperature):
    probabilities, _ = drawn(331, 7, 1.0)
    after = tempered(probabilities, temperature)
    assert (after.argsort(axis=1) == probabilities.argsort(axis=1)).all()
    assert after.sum(axis=1) == pytest.approx(1.0)
    assert tempered(after, 1 / temperature) == pytest.approx(probabilities, abs=1e-9)


def test_no_other_temperature_is_likelier():
    probabilities, targets = drawn(97, 3, 2.0, seed=3)
    loss = lambda t: -np.log(tempered(probabilities, t)[np.arange(97), targets]).mean()
    best = fit_temperature(probabilities, targets)
    assert all(loss(best) <= loss(t) for t in np.geomspace(0.1, 10, 301))


def test_rows_without_an_error_say_nothing():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert fit_temperature(probabilities, np.array([0, 1])) == 1.0
    assert fit_temperature(np.zeros((0, 2)), np.zeros(0, dtype=int)) == 1.0
    assert fit_temperature(probabilities, np.array([1, 0])) == pytest.approx(10.0)  # all wrong: as unsure as may be


def test_probabilities_of_zero_and_one_stay_finite():
    sure = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert np.isfinite(tempered(sure, 0.1)).all()
    assert np.isfinite(fit_temperature(sure, np.array([0, 1, 1])))


def test_calibration_error_is_what_its_definition_says():
    probabilities, targets = drawn(503, 5, 2.0)
    confidence, answers = probabilities.max(axis=1), probabilities.argmax(axis=1)
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - (answers == targets)[inside].mean())
    assert calibration_error(probabilities, targets) == pytest.approx(expected)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([1])) == 1.0


def test_yes_and_no_are_two_classes():
    yes = np.array([0.2, 0.9])
    assert as_two_classes(yes).tolist() == [[0.8, 0.2], [pytest.approx(0.1), 0.9]]
    scores = np.log(yes / (1 - yes))
    assert tempered(as_two_classes(yes), 3.0)[:, 1] == pytest.approx(1 / (1 + np.exp(-scores / 3)))


def test_a_classifier_keeps_its_temperature_and_its_answers(tmp_path):
    base = save_bert(tmp_path / "base")
    rows = [{"text": text, "label": inside[0]} for text, inside in sentences(61)]
    for i in range(0, 61, 5):
        rows[i]["label"] = rows[i - 1]["label"]  # some are wrong, so that the model is surer than it is right
    task, model, encoded = made("sequence_classification", base, rows, calibrate=True)
    trained(task, model, encoded, tmp_path / "run", epochs=6)
    before = np.stack(answered(task, model, encoded))
    assert task.settles
    task.learned |= task.settle(before, encoded.examples)
    assert task.temperature != 1.0
    after = np.stack(answered(task, model, encoded))
    assert (before.argsort(axis=1) == after.argsort(axis=1)).all()
    assert after == pytest.approx(tempered(before, task.temperature))
    figures = task.metrics(after, encoded.examples)
    assert figures["calibration"]["after"]["loss"] == pytest.approx(figures["loss"])
    assert figures["calibration"]["before"]["loss"] > figures["loss"]
    again = reread(task, base)
    assert np.array_equal(asked(again, model, encoded.features[:5]), asked(task, model, encoded.features[:5]))
    with torch.no_grad():  # what is compared when the adapter is read back is what is answered
        compared_there = task.outputs(model, task.collate(encoded.features[:5]))
    assert np.array_equal(compared_there.numpy(), np.stack(asked(task, model, encoded.features[:5])))
    assert not made("sequence_classification", base, rows)[0].settles
