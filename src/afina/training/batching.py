"""Batches of rows of like length: less padding, so fewer wasted products, without a fixed order of rows.

Rows are shuffled, cut into pools, sorted by length within each pool and cut into batches, which are shuffled again.
Every row comes once an epoch, and the order follows from seed and epoch alone, so that a resumed run sees the same. What is
given up of chance is who may meet whom: rows of one batch are neighbours in length within a pool of 64 batches, rows of the
same length as drawn. Of the tokens of short messages, batch 16, 60 % are padding in random order, 17 % with pools of 16
batches, 7 % with 64 and 1 % where all rows are one pool.

Batches by tokens (`tokens`) are cut out of all rows at once, as many rows as fit: their number must be the same in every
epoch, or the schedule would not know where it ends. Rows of the same length are drawn anew each time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise

__all__ = ["parts", "shuffled_batches", "sorted_batches", "stretches"]

_POOL = 64  # batches in a pool


def shuffled_batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int, tokens: int = 0) -> list[list[int]]:
    """Indices of the batches of one training epoch: `size` rows each, or as many as take `tokens` with their padding.

    A row longer than `tokens` is a batch of its own.
    """
    chance = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    chance.shuffle(order)
    if tokens:
        batches = _within(sorted(order, key=lambda i: -lengths[i]), lengths, 1, tokens)
    else:
        batches = []
        for start in range(0, len(order), size * _POOL):
            pool = sorted(order[start : start + size * _POOL], key=lambda i: lengths[i])
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    chance.shuffle(batches)
    return batches


def sorted_batches(lengths: Sequence[int], size: int, *, tokens: int = 0) -> list[list[int]]:
    """Indices of batches for reading every row once, the longest first: what does not fit in memory shows at once.

    Each has `size` rows, or as many more as take `tokens` with their padding.
    """
    return _within(sorted(range(len(lengths)), key=lambda i: -lengths[i]), lengths, size, tokens)


def _within(falling: Iterable[int], lengths: Sequence[int], size: int, tokens: int) -> list[list[int]]:
    """Rows that come the longest first, cut before one that would be neither among the first `size` nor within `tokens`."""
    batches: list[list[int]] = []
    for i in falling:
        if not batches or (len(batches[-1]) >= size and lengths[batches[-1][0]] * (len(batches[-1]) + 1) > tokens):
            batches.append([])
        batches[-1].append(i)
    return batches


def parts(batch: Sequence[int], count: int) -> list[list[int]]:
    """The batch in `count` parts of nearly the same size; a part is empty where rows are fewer than parts.

    Every part has rows from all over the batch: of processes none waits for another that has the long ones.
    """
    return [list(batch[i::count]) for i in range(count)]


def stretches(batch: Sequence[int], count: int) -> list[list[int]]:
    """As `parts`, of neighbours: a batch in the order of length has parts of like length, with less padding."""
    ends = [len(batch) * i // count for i in range(count + 1)]
    return [list(batch[first:last]) for first, last in pairwise(ends)]
