"""Figures agree with scikit-learn and scipy, ties and absent classes included."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from afina.tasks.metrics import classification_metrics, multi_label_metrics, regression_metrics
from afina.tasks.orders import average_precision, average_ranks, pearson, roc_auc, spearman

sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


@pytest.mark.parametrize(("rows", "values", "seed"), [(2, 2, 0), (7, 3, 1), (101, 5, 2), (307, 10_000, 3)])
def test_orders_with_ties(rows, values, seed):
    chance = np.random.default_rng(seed)
    scores, other = chance.integers(0, values, (2, rows)) / values
    truth = chance.random(rows) < 0.4
    truth[:2] = [True, False]
    assert average_ranks(scores) == pytest.approx(stats.rankdata(scores))
    assert roc_auc(scores, truth) == pytest.approx(sk.roc_auc_score(truth, scores))
    assert average_precision(scores, truth) == pytest.approx(sk.average_precision_score(truth, scores))
    if np.ptp(scores) and np.ptp(other):
        assert pearson(scores, other) == pytest.approx(stats.pearsonr(scores, other)[0])
        assert spearman(scores, other) == pytest.approx(stats.spearmanr(scores, other)[0])


def test_what_has_no_order_has_no_figure():
    one = np.array([0.3, 0.2])
    assert roc_auc(one, np.array([True, True])) is None
    assert average_precision(one, np.array([False, False])) is None
    assert pearson(np.ones(3), np.arange(3)) is None
    assert spearman(np.arange(3), np.ones(3)) is None


@pytest.mark.parametrize(("rows", "classes", "seed"), [(53, 2, 0), (211, 5, 1), (401, 13, 2)])
def test_classification_equals_scikit_learn(rows, classes, seed):
    chance = np.random.default_rng(seed)
    probabilities = chance.dirichlet(np.full(classes, 0.5), rows)
    truth = chance.permutation(np.arange(rows) % classes)
    ours = classification_metrics(probabilities, truth.tolist(), [f"c{i}" for i in range(classes)])
    scores = probabilities[:, 1] if classes == 2 else probabilities
    assert ours["roc_auc"] == pytest.approx(sk.roc_auc_score(truth, scores, multi_class="ovr"))
    assert ours["brier"] == pytest.approx(sk.brier_score_loss(truth, scores, labels=range(classes)))
    if classes >= 10:
        assert ours["top_3_accuracy"] == pytest.approx(sk.top_k_accuracy_score(truth, probabilities, k=3))
    else:
        assert "top_3_accuracy" not in ours


def test_of_equal_probabilities_the_first_three_are_the_likeliest():
    ours = classification_metrics(np.full((11, 11), 1 / 11), list(range(11)), [f"c{i}" for i in range(11)])
    assert ours["top_3_accuracy"] == pytest.approx(3 / 11)
    assert ours["accuracy"] == pytest.approx(1 / 11)


def test_roc_auc_leaves_out_classes_without_rows():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]])
    assert classification_metrics(probabilities, [0, 1, 0], list("abc"))["roc_auc"] == pytest.approx(1.0)
    assert classification_metrics(probabilities, [0, 0, 0], list("abc"))["roc_auc"] is None


@pytest.mark.parametrize(("rows", "labels", "seed"), [(1, 2, 0), (7, 3, 1), (211, 11, 2)])
def test_multi_label_equals_scikit_learn(rows, labels, seed):
    chance = np.random.default_rng(seed)
    probabilities = chance.random((rows, labels)).round(2)
    truth = chance.random((rows, labels)) < 0.3
    thresholds = chance.random(labels).round(2)
    ours = multi_label_metrics(probabilities, truth, [f"l{i}" for i in range(labels)], thresholds)
    answers = probabilities >= thresholds
    seen = (truth | answers).any(axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p, r, f, n = sk.precision_recall_fscore_support(truth, answers, zero_division=0)
        assert ours["micro_f1"] == pytest.approx(sk.f1_score(truth, answers, average="micro", zero_division=0))
    assert ours["macro_f1"] == pytest.approx(f[seen].mean() if seen.any() else 0.0)
    for i, figures in enumerate(ours["per_class"].values()):
        got = [figures[key] for key in ("precision", "recall", "f1", "rows")]
        assert got == pytest.approx([p[i], r[i], f[i], n[i]])
        if 0 < n[i] < rows:
            sides = truth[:, i], probabilities[:, i]
            assert figures["roc_auc"] == pytest.approx(sk.roc_auc_score(*sides))
            assert figures["average_precision"] == pytest.approx(sk.average_precision_score(*sides))
    assert ours["subset_accuracy"] == pytest.approx(sk.accuracy_score(truth, answers))
    assert ours["hamming_loss"] == pytest.approx(sk.hamming_loss(truth, answers))
    losses = [sk.log_loss(truth[:, i], np.clip(probabilities[:, i], 1e-12, 1 - 1e-12), labels=[0, 1]) for i in range(labels)]
    assert ours["loss"] == pytest.approx(np.mean(losses))


@pytest.mark.parametrize(("rows", "seed"), [(2, 0), (101, 1)])
def test_regression_equals_scikit_learn(rows, seed):
    chance = np.random.default_rng(seed)
    targets, answers = chance.normal(50, 7, (2, rows))
    ours = regression_metrics(answers, targets)
    assert ours["mse"] == pytest.approx(sk.mean_squared_error(targets, answers))
    assert ours["rmse"] == pytest.approx(sk.root_mean_squared_error(targets, answers))
    assert ours["mae"] == pytest.approx(sk.mean_absolute_error(targets, answers))
    assert ours["r2"] == pytest.approx(sk.r2_score(targets, answers))
    assert regression_metrics(answers, np.full(rows, 3.0))["r2"] is None
