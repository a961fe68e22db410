"""Figures for classifiers and regressions, from small answers and true values; they agree with scikit-learn.

It is not needed: these are a few lines of numpy each, and scikit-learn with scipy would be the heaviest dependency after
torch, on every machine that only answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from afina.tasks.calibration import as_two_classes, calibration_error
from afina.tasks.orders import average_precision, pearson, roc_auc, spearman

__all__ = ["classification_metrics", "multi_label_metrics", "regression_metrics"]

TOP = 3  # answers looked at in top-3 accuracy
MANY = 10  # classes from which on it says something


def classification_metrics(probabilities: np.ndarray, targets: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Loss, accuracy, macro F1, ROC AUC, calibration; precision, recall and F1 of each class; the confusion matrix.

    `probabilities` is `[rows, classes]`. The matrix has true classes in rows and answers in columns. A class that was
    never answered has precision 0; one without true rows has recall 0 and still counts in the macro average where it
    was answered, as in scikit-learn. `roc_auc` is that of the second of two classes, or the mean of one class against the
    rest over the classes that have rows; None where no class has both kinds of rows. `brier` is halved for two classes, so
    that it lies between 0 and 1, as in scikit-learn. `top_3_accuracy` is there from ten classes on.
    """
    truth = np.asarray(targets, dtype=np.int64)
    answers = probabilities.argmax(axis=1)
    n = len(labels)
    confusion = np.zeros((n, n), dtype=np.int64)
    np.add.at(confusion, (truth, answers), 1)
    hits = confusion.diagonal().astype(float)
    answered, present = confusion.sum(axis=0), confusion.sum(axis=1)
    precision = np.divide(hits, answered, out=np.zeros(n), where=answered > 0)
    recall = np.divide(hits, present, out=np.zeros(n), where=present > 0)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros(n), where=both > 0)
    seen = (answered + present) > 0
    own = probabilities[np.arange(len(truth)), truth]
    columns = [1] if n == 2 else range(n)
    areas = [a for c in columns if (a := roc_auc(probabilities[:, c], truth == c)) is not None]
    # of equal probabilities the first counts as the likelier, as for the answer itself
    before = np.arange(n)[None] < truth[:, None]
    above = ((probabilities > own[:, None]) | ((probabilities == own[:, None]) & before)).sum(axis=1)
    brier = float(((probabilities**2).sum(axis=1) - 2 * own + 1).mean())
    return {
        "rows": len(truth),
        "loss": float(-np.log(np.clip(own, 1e-12, 1.0)).mean()),
        "accuracy": float(hits.sum() / len(truth)),
        "macro_f1": float(f1[seen].mean()),
        "roc_auc": float(np.mean(areas)) if areas else None,
        "brier": brier / 2 if n == 2 else brier,
        "calibration_error": calibration_error(probabilities, truth),
        **({"top_3_accuracy": float((above < TOP).mean())} if n >= MANY else {}),
        "per_class": {
            label: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "rows": int(present[i]),
            }
            for i, label in enumerate(labels)
        },
        "confusion": confusion.tolist(),
        "labels": list(labels),
    }


def multi_label_metrics(
    probabilities: np.ndarray, truth: np.ndarray, labels: Sequence[str], thresholds: Sequence[float] | np.ndarray
) -> dict[str, Any]:
    """Figures of rows that have any number of labels: `probabilities` and `truth` are `[rows, labels]`.

    A label is answered where its probability reaches its threshold. `loss` is the mean over rows and labels; averages over
    labels leave out those that neither are true nor answered (F1) or have no true row (average precision, ROC AUC).
    """
    truth = np.asarray(truth, dtype=bool)
    answers = probabilities >= np.asarray(thresholds)
    hits, answered, present = (x.sum(axis=0).astype(float) for x in (truth & answers, answers, truth))
    n = len(labels)
    precision = np.divide(hits, answered, out=np.zeros(n), where=answered > 0)
    recall = np.divide(hits, present, out=np.zeros(n), where=present > 0)
    either = answered + present
    f1 = np.divide(2 * hits, either, out=np.zeros(n), where=either > 0)
    chosen = np.clip(np.where(truth, probabilities, 1 - probabilities), 1e-12, 1.0)
    areas = [roc_auc(probabilities[:, i], truth[:, i]) for i in range(n)]
    curves = [average_precision(probabilities[:, i], truth[:, i]) for i in range(n)]
    return {
        "rows": len(truth),
        "loss": float(-np.log(chosen).mean()),
        "micro_f1": float(2 * hits.sum() / either.sum()) if either.sum() else 0.0,
        "macro_f1": float(f1[either > 0].mean()) if either.any() else 0.0,
        "subset_accuracy": float((truth == answers).all(axis=1).mean()),
        "hamming_loss": float((truth != answers).mean()),
        "mean_average_precision": _mean(curves) or 0.0,
        "roc_auc": _mean(areas),
        "calibration_error": calibration_error(as_two_classes(probabilities).reshape(-1, 2), truth.reshape(-1)),
        "labels_per_row": {"true": float(truth.sum(axis=1).mean()), "answered": float(answers.sum(axis=1).mean())},
        "per_class": {
            label: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "rows": int(present[i]),
                "average_precision": curves[i],
                "roc_auc": areas[i],
                "threshold": float(np.broadcast_to(thresholds, n)[i]),
            }
            for i, label in enumerate(labels)
        },
        "labels": list(labels),
    }


def regression_metrics(answers: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Errors in the unit of the target, R², and correlations; all `[rows]`.

    R² and correlations are None where the targets, or the answers, do not vary.
    """
    answers, targets = np.asarray(answers, dtype=float), np.asarray(targets, dtype=float)
    errors = answers - targets
    squares = float((errors**2).mean())
    spread = float(targets.var())
    return {
        "rows": len(targets),
        "mse": squares,
        "rmse": squares**0.5,
        "mae": float(np.abs(errors).mean()),
        "r2": 1 - squares / spread if spread else None,
        "pearson": pearson(answers, targets),
        "spearman": spearman(answers, targets),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None
