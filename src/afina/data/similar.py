"""Finds texts that are nearly the same, without comparing all pairs.

Two texts are near duplicates when their sets of five-letter pieces share at least four fifths (Jaccard). Of two such
sets, the rarest few pieces of each must have one in common (prefix filter; Chaudhuri et al. 2006), so only texts that
share a rare piece are looked at; and most of those are told apart by 512 bits each, since texts differ in at least as many
pieces as their bits do (bitmap filter; Sandes et al. 2017). Pieces are hashed, and what is rare is counted in a table of
fixed size, so that no more is held than the bits and the rarest fifth of each text's pieces.

What is found is exact, where MinHash estimates, but for texts whose rarest pieces are in more than 200 others: they are
compared with 200 of these, the rarest pieces first, so that a million rows of one template cost no more than others do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from afina.data.groups import Union

__all__ = ["near_duplicates"]

_PIECE = 5
_BUCKETS = 1 << 22  # of the table that counts hashed pieces
_BITS = 512
_MOST = 200  # texts that one text is compared with
_CHUNK = 1 << 18  # letters hashed at a time
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing
_SHIFT = np.uint64(32)
_SHIFTED = np.uint64(1 << 32)
_UPPER = np.uint64(0xFFFFFFFF00000000)


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[list[int]]:
    """Groups of two and more indices, ascending, joined by chains of near duplicates. Texts come normalised."""
    counts = np.zeros(_BUCKETS, np.int32)
    for _, _, hashes in _chunks(texts):
        counts += np.bincount(hashes % np.uint64(_BUCKETS), minlength=_BUCKETS).astype(np.int32)
    order = np.argsort([len(text) for text in texts], kind="stable")  # shorter texts come first
    sizes, bits, entries = _prefixes(texts, counts, threshold, order)
    union = Union(len(texts))
    pieces = lru_cache(maxsize=1 << 12)(lambda i: _pieces(texts[i]))
    most_apart = (1 - threshold) / (1 + threshold)
    for i, others in _candidates(entries, order):
        both = sizes[others] + sizes[i]
        apart = np.bitwise_count(bits[others] ^ bits[i]).sum(axis=1)
        fits = np.maximum(apart, np.abs(sizes[others] - sizes[i])) <= both * most_apart + 1e-6
        for j in np.unique(others[fits]).tolist():
            if union.root(i) != union.root(j):
                x, y = pieces(i), pieces(j)
                shared = len(x & y)
                if shared >= threshold * (len(x) + len(y) - shared):
                    union.join(i, j)
    return union.groups()


def _pieces(text: str) -> set[str]:
    return {text[i : i + _PIECE] for i in range(max(1, len(text) - _PIECE + 1))}


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Some texts at a time: the number of the first, and for each of their pieces the text (counted from the first) and
    the hash."""
    first = 0
    while first < len(texts):
        last, letters = first, 0
        while last < len(texts) and (letters < _CHUNK or last == first):
            letters += max(len(texts[last]), _PIECE)
            last += 1
        padded = [text if len(text) >= _PIECE else text.ljust(_PIECE, "\0") for text in texts[first:last]]
        codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        owner = np.repeat(np.arange(last - first), [len(text) for text in padded])
        hashes = np.zeros(len(codes) - _PIECE + 1, np.uint64)
        for place in range(_PIECE):
            hashes = (hashes ^ codes[place : place + len(hashes)]) * _MIX
            hashes ^= hashes >> _SHIFT
        inside = owner[: len(hashes)] == owner[_PIECE - 1 :]  # no piece reaches into the next text
        owner, hashes = owner[: len(hashes)][inside], hashes[inside]
        yield first, owner, hashes
        first = last


def _prefixes(
    texts: Sequence[str], counts: np.ndarray, threshold: float, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of pieces of each text `[texts]`, the bits that they set `[texts, words]`, and the rarest pieces of each
    that occur elsewhere, sorted: half a hash above the place of the text in `order`."""
    sizes = np.zeros(len(texts), np.int32)
    bits = np.zeros((len(texts), _BITS // 64), np.uint64)
    rank = np.empty(len(texts), np.uint64)
    rank[order] = np.arange(len(texts), dtype=np.uint64)
    found = [np.zeros(0, np.uint64)]
    for first, owner, hashes in _chunks(texts):
        rarity = counts[hashes % np.uint64(_BUCKETS)]
        by_rarity = np.lexsort((hashes, rarity, owner))
        owner, hashes, rarity = owner[by_rarity], hashes[by_rarity], rarity[by_rarity]
        new = np.ones(len(hashes), bool)  # each piece once a text
        new[1:] = (owner[1:] != owner[:-1]) | (hashes[1:] != hashes[:-1])
        owner, hashes, rarity = owner[new], hashes[new], rarity[new]
        lengths = np.bincount(owner)
        sizes[first : first + len(lengths)] = lengths
        set_bits = np.zeros((len(lengths), _BITS), bool)
        set_bits[owner, (hashes >> np.uint64(40)) % np.uint64(_BITS)] = True
        bits[first : first + len(lengths)] = np.packbits(set_bits, axis=1).view(np.uint64)
        position = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        most = lengths - np.ceil(threshold * lengths - 1e-9).astype(np.int64) + 1
        taken = (position < most[owner]) & (rarity > 1)
        found.append((hashes[taken] & _UPPER) | rank[owner[taken] + first])
    entries = np.concatenate(found)
    del found
    entries.sort()
    same = (entries[1:] ^ entries[:-1]) < _SHIFTED
    shared = np.zeros(len(entries), bool)
    shared[1:] |= same
    shared[:-1] |= same
    return sizes, bits, entries[shared]


def _candidates(entries: np.ndarray, order: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each text with texts, no longer than it, that share one of its rarest pieces."""
    owners = order.astype(np.int32)[(entries & ~_UPPER).astype(np.uint32)]
    begins = np.ones(len(entries), bool)
    begins[1:] = (entries[1:] ^ entries[:-1]) >= _SHIFTED
    start = np.arange(len(entries), dtype=np.int32)
    start[~begins] = 0
    start = np.maximum.accumulate(start)  # where the run of its piece begins
    later = np.flatnonzero(~begins).astype(np.uint64)
    later |= entries[later] << _SHIFT  # the place of the text above the place of the entry
    later.sort()
    later = (later & ~_UPPER).astype(np.int32)
    edges = np.flatnonzero(np.diff(owners[later], prepend=-1, append=-1))
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        places = later[low:high]
        chosen, left = [], _MOST
        for place in places[np.argsort(places - start[places], kind="stable")].tolist():
            chosen.append(owners[max(start[place], place - left) : place])  # those nearest in length
            left -= len(chosen[-1])
            if not left:
                break
        yield int(owners[places[0]]), np.concatenate(chosen)
