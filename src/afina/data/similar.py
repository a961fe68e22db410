"""Finds texts that are nearly the same, exactly and without comparing all pairs.

Two texts are near duplicates when their sets of five-letter pieces share at least four fifths (Jaccard). Of two such
sets, the rarest few pieces of each must have one in common (prefix filter; Chaudhuri et al. 2006), so only texts that
share a rare piece are compared. MinHash would estimate the same and needs scipy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from afina.data.groups import Union

__all__ = ["near_duplicates"]

_PIECE = 5


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[list[int]]:
    """Groups of two and more indices, ascending, joined by chains of near duplicates. Texts come normalised."""
    sets = [{text[i : i + _PIECE] for i in range(max(1, len(text) - _PIECE + 1))} for text in texts]
    counts = Counter(piece for pieces in sets for piece in pieces)
    union = Union(len(texts))
    index: dict[str, list[int]] = {}
    for i in sorted(range(len(texts)), key=lambda i: len(sets[i])):
        pieces = sets[i]
        order = sorted(pieces, key=lambda piece: (counts[piece], piece))
        prefix = [piece for piece in order[: len(order) - -int(-threshold * len(order) // 1) + 1] if counts[piece] > 1]
        for other in {j for piece in prefix for j in index.get(piece, ())}:
            if len(sets[other]) < threshold * len(pieces) or union.root(other) == union.root(i):
                continue
            shared = len(pieces & sets[other])
            if shared >= threshold * (len(pieces) + len(sets[other]) - shared):
                union.join(i, other)
        for piece in prefix:
            index.setdefault(piece, []).append(i)
    return union.groups()
