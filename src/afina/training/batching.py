"""Batches of rows of like length: less padding, so fewer wasted products, without a fixed order of rows.

Rows are shuffled, cut into pools, sorted by length within each pool and cut into batches, which are shuffled again.
Every row comes once an epoch, and the order follows from seed and epoch alone, so that a resumed run sees the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["parts", "shuffled_batches", "sorted_batches"]

_POOL = 16  # batches in a pool


def shuffled_batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the batches of one training epoch."""
    chance = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    chance.shuffle(order)
    batches = []
    for start in range(0, len(order), size * _POOL):
        pool = sorted(order[start : start + size * _POOL], key=lambda i: lengths[i])
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    chance.shuffle(batches)
    return batches


def sorted_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of batches for reading every row once, the longest first: what does not fit in memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


def parts(batch: Sequence[int], count: int) -> list[list[int]]:
    """The batch in `count` parts of nearly the same size; a part is empty where rows are fewer than parts."""
    return [list(batch[i::count]) for i in range(count)]
