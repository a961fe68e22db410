"""Figures agree with scikit-learn, also where a class is never answered or never true."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from afina.tasks.baselines import majority, word_counts
from afina.tasks.metrics import classification_metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")


@pytest.mark.parametrize(("rows", "classes", "seed"), [(1, 2, 0), (7, 2, 1), (53, 5, 2), (11, 13, 3), (301, 3, 4)])
def test_figures_equal_scikit_learn(rows, classes, seed):
    chance = np.random.default_rng(seed)
    probabilities = chance.dirichlet(np.full(classes, 0.5), rows)
    truth = chance.integers(0, classes, rows)
    labels = [f"c{i}" for i in range(classes)]
    ours = classification_metrics(probabilities, truth.tolist(), labels)
    answers = probabilities.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p, r, f, n = sklearn_metrics.precision_recall_fscore_support(truth, answers, labels=range(classes), zero_division=0)
        macro = sklearn_metrics.f1_score(truth, answers, average="macro", zero_division=0)
        matrix = sklearn_metrics.confusion_matrix(truth, answers, labels=range(classes))
    assert ours["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, answers))
    assert ours["macro_f1"] == pytest.approx(macro)
    assert ours["confusion"] == matrix.tolist()
    for i, label in enumerate(labels):
        got = ours["per_class"][label]
        assert (got["precision"], got["recall"], got["f1"], got["rows"]) == pytest.approx((p[i], r[i], f[i], n[i]))
    assert ours["loss"] == pytest.approx(-np.log(probabilities[np.arange(rows), truth].clip(1e-12)).mean())


def test_baselines():
    frequencies = majority([0, 0, 0, 1, 2], 7, 4)
    assert frequencies.shape == (7, 4)
    assert frequencies[0].tolist() == [0.6, 0.2, 0.2, 0.0]
    texts = ["red wine", "red car", "blue sea", "blue sky"]
    told = word_counts(texts, [0, 0, 1, 1], ["a red boat", "blue", "unseen words", ""], 2)
    assert told.sum(axis=1) == pytest.approx(1.0)
    assert told[0, 0] > 0.5 > told[1, 0]
    assert told[2].tolist() == pytest.approx([0.5, 0.5])
