"""How far a figure of a small test set can be trusted: intervals, calibration, and a test for pairs of answers.

Wilson (1927) for shares, a seeded bootstrap of the test rows for other figures, expected calibration error
(https://arxiv.org/abs/1706.04599); for two models on the same rows McNemar's exact test (1947) where answers are right or
wrong, and a seeded sign-flip test (Fisher 1935) where they have a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Bin", "bootstrapped", "calibration", "calibration_error", "histogram", "macro_f1_interval", "mcnemar", "middle_95",
    "resampled_sums", "sign_flip", "wilson",
]  # fmt: skip

_Z = 1.959963984540054  # two-sided 95 %
_RESAMPLES = 2000


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """95 % interval of a share; (0, 1) of no rows."""
    if rows == 0:
        return 0.0, 1.0
    share, square = hits / rows, _Z * _Z
    middle = (share + square / (2 * rows)) / (1 + square / rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows)) / (1 + square / rows)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if hits == 0 else low), (1.0 if hits == rows else high)


def macro_f1_interval(confusion: Sequence[Sequence[int]], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of macro F1 when the test rows are drawn again, with replacement."""
    matrix = np.asarray(confusion, dtype=np.int64)
    truth, answer = np.nonzero(matrix)
    counts, classes = matrix[truth, answer], len(matrix)
    rows = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(rows, counts / rows, size=_RESAMPLES)  # [resamples, cells in use]
    hits, present, answered = (np.zeros((_RESAMPLES, classes)) for _ in range(3))
    for cell, (i, j) in enumerate(zip(truth, answer, strict=True)):
        present[:, i] += drawn[:, cell]
        answered[:, j] += drawn[:, cell]
        if i == j:
            hits[:, i] += drawn[:, cell]
    both = present + answered  # F1 is twice the hits over this
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    scores = f1.sum(axis=1) / (both > 0).sum(axis=1)
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def resampled_sums(counts: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Sums over rows of `counts [rows, k]` when the rows are drawn again, with replacement: `[resamples, k]`."""
    rows, chance = len(counts), np.random.default_rng(seed)
    return np.stack([
        np.bincount(chance.integers(0, rows, rows), minlength=rows) @ counts for _ in range(resamples)
    ])  # fmt: skip


def bootstrapped(figure: Callable[[np.ndarray], float | None], rows: int, resamples: int = 300, seed: int = 0) -> np.ndarray:
    """`figure` of the numbers of rows that were drawn again, with replacement; where it has no value it is left out."""
    chance = np.random.default_rng(seed)
    made = (figure(chance.integers(0, rows, rows)) for _ in range(resamples))
    return np.array([value for value in made if value is not None])


def middle_95(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of what a bootstrap gave."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def sign_flip(differences: np.ndarray, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided probability of a mean difference at least as large, were the two models to change places row by row."""
    differences = np.asarray(differences, dtype=float)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    chance, observed, beyond = np.random.default_rng(seed), abs(differences.sum()), 1
    block = max(1, 5_000_000 // len(differences))
    for done in range(0, draws, block):
        signs = chance.integers(0, 2, (min(block, draws - done), len(differences))) * 2 - 1
        beyond += int((np.abs(signs @ differences) >= observed * (1 - 1e-12)).sum())
    return beyond / (draws + 1)


def histogram(values: Sequence[int], bins: int = 24) -> dict[str, list[int]]:
    """Counts of whole numbers in at most that many bins of equal width: `edges` (one more than bins) and `counts`."""
    low, high = (min(values), max(values)) if len(values) else (0, 0)
    width = max(1, -(-(high - low + 1) // bins))
    edges = list(range(low, high + 1 + width, width))
    counts, _ = np.histogram(np.asarray(values, dtype=float), [edge - 0.5 for edge in edges])
    return {"edges": edges, "counts": counts.tolist()}


@dataclass(frozen=True)
class Bin:
    """Rows whose answers had a probability between `low` and `high`."""

    low: float
    high: float
    rows: int
    hits: int
    confidence: float  # mean probability of the answers


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> list[Bin]:
    """Bins of equal width that hold rows; a confidence of 1 belongs to the last."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        Bin(b / bins, (b + 1) / bins, int(own.sum()), int(right[own].sum()), float(confidence[own].mean()))
        for b in range(bins)
        if (own := place == b).any()
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance between what was promised and what came true, weighted by rows."""
    rows = sum(b.rows for b in bins)
    return sum(b.rows * abs(b.hits / b.rows - b.confidence) for b in bins) / rows if rows else 0.0


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided probability of a split at least as uneven among the rows that just one of two models has right."""
    rows, few = only_first + only_second, min(only_first, only_second)
    ways = total = 1
    for k in range(1, few + 1):
        ways = ways * (rows - k + 1) // k
        total += ways
    return min(1.0, (2 * total) / (1 << rows))
