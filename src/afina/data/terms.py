"""Words and pairs of words of a text, and the classifier that counts them: what a model must know better than."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

__all__ = ["WordCounts", "terms"]


def terms(text: str) -> list[str]:
    """The words of a text and its pairs of neighbouring words, in lower case, each once."""
    words = re.findall(r"\w+", text.lower())
    return list(dict.fromkeys([*words, *(f"{a} {b}" for a, b in pairwise(words))]))


class WordCounts:
    """Naive Bayes on terms, each counted once a text. `rows` are numbers of terms below `size`, `targets` of classes."""

    def __init__(self, rows: Sequence[Sequence[int]], targets: Sequence[int], size: int, classes: int):
        counts = np.ones((classes, size), np.float32)  # add-one smoothing
        for row, target in zip(rows, targets, strict=True):
            counts[target, row] += 1
        self.weights = np.log(counts) - np.log(counts.sum(axis=1, dtype=np.float64))[:, None]
        with np.errstate(divide="ignore"):  # a class without a row is never answered
            self.prior = np.log(np.bincount(np.asarray(targets), minlength=classes) / len(targets))

    def scores(self, row: Sequence[int]) -> np.ndarray:
        """Logarithms, up to a constant, of the probability of each class `[classes]`."""
        scores: np.ndarray = self.prior + self.weights[:, list(row)].sum(axis=1, dtype=np.float64)
        return scores
