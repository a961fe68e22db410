"""Figures that depend on the order of scores alone: ranks, area under the ROC curve, average precision, correlations.

They agree with scikit-learn and scipy, which are not needed; ties are shared fairly, as there.
"""

from __future__ import annotations

import numpy as np

__all__ = ["average_precision", "average_ranks", "pearson", "roc_auc", "spearman"]


def average_ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks of `scores [rows]` from 1 for the smallest; equal scores share the mean of their ranks."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)]


def roc_auc(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """How often a true row is scored above one that is not, ties counting half; None without rows of both kinds.

    `scores [rows]`, `truth [rows]` of booleans.
    """
    truth = np.asarray(truth, dtype=bool)
    yes, no = int(truth.sum()), int((~truth).sum())
    if not yes or not no:
        return None
    return float((average_ranks(scores)[truth].sum() - yes * (yes + 1) / 2) / (yes * no))


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Precision at each distinct score, weighted by the recall gained there; None without a true row."""
    truth = np.asarray(truth, dtype=bool)
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # the last row of each distinct score
    recall = hits[last] / hits[-1]
    return float((np.diff(recall, prepend=0.0) * hits[last] / (last + 1)).sum())


def pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """Linear correlation; None where one side does not vary."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a / np.linalg.norm(a)) @ (b / np.linalg.norm(b)), -1.0, 1.0))


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of ranks; None where one side does not vary."""
    return pearson(average_ranks(np.asarray(a)), average_ranks(np.asarray(b)))
