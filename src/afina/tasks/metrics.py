"""Figures for classifiers, from probabilities and true classes; agrees with scikit-learn, which is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["classification_metrics"]


def classification_metrics(probabilities: np.ndarray, targets: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Loss, accuracy, macro F1, precision, recall and F1 of each class, and the confusion matrix.

    `probabilities` is `[rows, classes]`. The matrix has true classes in rows and answers in columns. A class that was
    never answered has precision 0; one without true rows has recall 0 and still counts in the macro average where it
    was answered, as in scikit-learn.
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
    chosen = np.clip(probabilities[np.arange(len(truth)), truth], 1e-12, 1.0)
    return {
        "rows": len(truth),
        "loss": float(-np.log(chosen).mean()),
        "accuracy": float(hits.sum() / len(truth)),
        "macro_f1": float(f1[seen].mean()),
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
