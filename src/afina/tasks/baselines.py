"""What a score must beat to mean anything: always the same answer, and counting words without reading them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from afina.data.terms import WordCounts, terms

__all__ = ["label_frequencies", "majority", "word_counts", "word_overlap", "word_ridge", "words_of_each_label"]

RIDGE_TERMS = 2000  # most frequent terms that ridge regression looks at
RIDGE_PENALTY = 1.0
_BLOCK = 1000  # texts turned into numbers at once


def majority(train: Sequence[int], rows: int, classes: int) -> np.ndarray:
    """Probabilities `[rows, classes]` that are the frequencies of the training rows, whatever the text says."""
    counts = np.bincount(np.asarray(train), minlength=classes).astype(float)
    return np.tile(counts / counts.sum(), (rows, 1))


def word_counts(train_texts: Sequence[str], train: Sequence[int], texts: Sequence[str], classes: int) -> np.ndarray:
    """Probabilities of a naive Bayes classifier on words and pairs of neighbouring words, each counted once a text."""
    vocabulary: dict[str, int] = {}
    rows = [[vocabulary.setdefault(term, len(vocabulary)) for term in terms(text)] for text in train_texts]
    counted = WordCounts(rows, train, len(vocabulary), classes)
    scores = np.stack([counted.scores([vocabulary[t] for t in terms(text) if t in vocabulary]) for text in texts])
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def label_frequencies(train: np.ndarray, rows: int) -> np.ndarray:
    """Probabilities `[rows, labels]` that are each label's share of the training rows `[training rows, labels]`."""
    return np.tile(np.asarray(train, dtype=float).mean(axis=0), (rows, 1))


def words_of_each_label(train_texts: Sequence[str], train: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Probabilities `[rows, labels]`, from `train [training rows, labels]`: one naive Bayes classifier a label.

    A label that all or none of the training rows have is answered by its share.
    """
    answers = label_frequencies(train, len(texts))
    for i, own in enumerate(np.asarray(train).T.astype(int)):
        if 0 < own.sum() < len(own):
            answers[:, i] = word_counts(train_texts, own.tolist(), texts, 2)[:, 1]
    return answers


def word_ridge(train_texts: Sequence[str], train: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Numbers `[rows]` of a ridge regression on which words and pairs of words a text has, each text scaled to length 1."""
    counts = Counter(term for text in train_texts for term in terms(text))
    number = {term: i for i, (term, _) in enumerate(counts.most_common(RIDGE_TERMS))}
    n, mean = len(number), float(np.mean(train))
    products, sums = np.eye(n) * RIDGE_PENALTY, np.zeros(n)
    for start in range(0, len(train_texts), _BLOCK):
        x = _scaled(train_texts[start : start + _BLOCK], number)
        products += x.T @ x
        sums += x.T @ (np.asarray(train[start : start + _BLOCK], dtype=float) - mean)
    weights = np.linalg.solve(products, sums)
    blocks = [_scaled(texts[start : start + _BLOCK], number) @ weights for start in range(0, len(texts), _BLOCK)]
    return mean + np.concatenate(blocks)


def _scaled(texts: Sequence[str], number: Mapping[str, int]) -> np.ndarray:
    made = np.zeros((len(texts), len(number)))
    for i, text in enumerate(texts):
        made[i, [number[term] for term in terms(text) if term in number]] = 1.0
    return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1.0)


def word_overlap(train_texts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Vectors `[texts, words]` of length 1: which words a text has, rare ones weighing more (inverse frequency).

    Frequencies are those of `train_texts`; words that are in none of `texts` have no column, since they change no product.
    """
    split = [set(re.findall(r"\w+", text.lower())) for text in texts]
    number = {word: i for i, word in enumerate(sorted(set().union(*split)))}
    counts = Counter(word for text in train_texts for word in set(re.findall(r"\w+", text.lower())))
    made = np.zeros((len(texts), max(len(number), 1)), dtype=np.float32)
    for row, words in zip(made, split, strict=True):
        for word in words:
            row[number[word]] = np.log((1 + len(train_texts)) / (1 + counts[word])) + 1
    return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-9)
