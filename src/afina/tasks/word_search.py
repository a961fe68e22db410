"""Search by shared words (BM25): what vectors and rerankers must beat to mean anything.

Robertson and Zaragoza, 2009, https://doi.org/10.1561/1500000019; the weight of a rare word is that of Lucene, which is
never negative. A query costs the sum of the passages that each of its words is in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["WordSearch"]

_K, _B = 1.2, 0.75  # how soon repeating a word counts no more, and how much long passages are held back
_WORD = re.compile(r"\w+")


class WordSearch:
    """Passages by the words in them."""

    def __init__(self, passages: Sequence[str]):
        self.size = len(passages)
        counts = [Counter(_WORD.findall(text.lower())) for text in passages]
        lengths = np.array([sum(c.values()) for c in counts], dtype=np.float64)
        held = _K * (1 - _B + _B * lengths / max(lengths.mean(), 1.0))
        found: dict[str, tuple[list[int], list[int]]] = {}
        for i, words in enumerate(counts):
            for word, times in words.items():
                places, numbers = found.setdefault(word, ([], []))
                places.append(i)
                numbers.append(times)
        self.words: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, (places, numbers) in found.items():
            at, often = np.array(places), np.array(numbers, dtype=np.float64)
            rare = np.log(1 + (self.size - len(at) + 0.5) / (len(at) + 0.5))
            self.words[word] = at, rare * often / (often + held[at])

    def scores(self, query: str) -> np.ndarray:
        """Of every passage `[passages]`; a word that the query has twice counts twice."""
        made = np.zeros(self.size)
        for word, times in Counter(_WORD.findall(query.lower())).items():
            if word in self.words:
                at, weights = self.words[word]
                made[at] += times * weights
        return made
