"""What a score must beat to mean anything: always the same answer, and counting words without reading them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

__all__ = ["majority", "word_counts"]


def majority(train: Sequence[int], rows: int, classes: int) -> np.ndarray:
    """Probabilities `[rows, classes]` that are the frequencies of the training rows, whatever the text says."""
    counts = np.bincount(np.asarray(train), minlength=classes).astype(float)
    return np.tile(counts / counts.sum(), (rows, 1))


def word_counts(train_texts: Sequence[str], train: Sequence[int], texts: Sequence[str], classes: int) -> np.ndarray:
    """Probabilities of a naive Bayes classifier on words and pairs of neighbouring words, each counted once a text."""
    vocabulary: dict[str, int] = {}
    rows = [[vocabulary.setdefault(term, len(vocabulary)) for term in _terms(text)] for text in train_texts]
    counts = np.ones((classes, len(vocabulary)))  # add-one smoothing
    for row, target in zip(rows, train, strict=True):
        counts[target, row] += 1
    weights = np.log(counts) - np.log(counts.sum(axis=1, keepdims=True))
    prior = np.log(np.bincount(np.asarray(train), minlength=classes) / len(train))
    scores = np.stack([prior + weights[:, [vocabulary[t] for t in _terms(x) if t in vocabulary]].sum(axis=1) for x in texts])
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def _terms(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return list(dict.fromkeys([*words, *(f"{a} {b}" for a, b in pairwise(words))]))
