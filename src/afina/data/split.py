"""Divides rows into train, validation and test: stratum by stratum, groups together, the same way for the same seed."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

__all__ = ["shares_of", "stratified"]

Sides = tuple[list[int], list[int], list[int]]


def shares_of(rows: int, validation: float, test: float) -> tuple[int, int, int]:
    """How many rows train, validation and test get; what rounding leaves over goes to the last of them that has a share."""
    train = math.floor(round((1 - validation - test) * rows, 6))
    if not test:
        return train, rows - train, 0
    held = math.floor(round(validation * rows, 6))
    return train, held, rows - train - held


def stratified(
    strata: Sequence[str], *, validation: float, test: float, seed: int, groups: Sequence[Sequence[int]] = ()
) -> Sides:
    """Indices of the train, validation and test rows, each in ascending order.

    `validation` and `test` are shares of all rows, and as nearly as can be of each stratum. A stratum of three and more
    rows has one on every side that has a share; smaller ones go to train before validation before test. Indices of one of
    the `groups` stay together, on a side drawn in proportion to the room that is left there; a side that none of them fits
    takes the smallest.
    """
    members: dict[str, list[int]] = {}
    for index, name in enumerate(strata):
        members.setdefault(name, []).append(index)
    sizes = {name: len(rows) for name, rows in members.items()}
    chance = random.Random(seed)
    _, all_held, all_test = shares_of(len(strata), validation, test)
    kept = 2 if test else 1  # rows of a stratum that validation leaves to test and train
    spare = {name: max(min(1, size - 1), size - kept) for name, size in sizes.items()}
    held = _portions(sizes, spare, all_held) if validation else dict.fromkeys(sizes, 0)
    spare = {name: max(0, size - 1 - held[name]) for name, size in sizes.items()}
    tested = _portions(sizes, spare, all_test) if test else dict.fromkeys(sizes, 0)
    room = [{name: size - held[name] - tested[name] for name, size in sizes.items()}, held, tested]
    portions = [dict(part) for part in room]
    sides: Sides = ([], [], [])
    whole: list[Sequence[int]] = []  # groups in train
    grouped = {index for group in groups for index in group}
    for group in sorted(chance.sample(list(groups), len(groups)), key=len, reverse=True):
        needed = Counter(strata[index] for index in group)
        left = [min(part[name] // count for name, count in needed.items()) for part in room]
        weights = [sum(part[name] for name in needed) if fits > 0 else 0 for part, fits in zip(room, left, strict=True)]
        side = chance.choices((0, 1, 2), weights=weights)[0] if any(weights) else 0
        sides[side].extend(group)
        if not side:
            whole.append(group)
        for name, count in needed.items():
            room[side][name] -= count
    for name in sorted(members):
        rows = [index for index in members[name] if index not in grouped]
        chance.shuffle(rows)
        n_test, n_held = max(0, room[2][name]), max(0, room[1][name])
        sides[2].extend(rows[:n_test])
        sides[1].extend(rows[n_test : n_test + n_held])
        sides[0].extend(rows[n_test + n_held :])
    for side in (2, 1):
        for name in sorted(members):
            if portions[side][name] and not any(strata[index] == name for index in sides[side]):
                _move_smallest(whole, sides, side, strata, name)
    return sorted(sides[0]), sorted(sides[1]), sorted(sides[2])


def _move_smallest(whole: list[Sequence[int]], sides: Sides, side: int, strata: Sequence[str], name: str) -> None:
    """Move the smallest group with that stratum out of train, where train keeps a row of each of its strata."""
    left = Counter(strata[index] for index in sides[0])
    for group in sorted(whole, key=len):
        needed = Counter(strata[index] for index in group)
        if name in needed and all(left[other] > count for other, count in needed.items()):
            whole.remove(group)
            sides[side].extend(group)
            taken = set(group)
            sides[0][:] = [index for index in sides[0] if index not in taken]
            return


def _portions(sizes: dict[str, int], spare: dict[str, int], total: int) -> dict[str, int]:
    """How many rows of each stratum make up `total`: their share of all, at least one, and at most `spare`.

    What is lacking after rounding down goes to the largest remainders.
    """
    exact = {name: total * size / sum(sizes.values()) for name, size in sizes.items()}
    parts = {name: min(spare[name], max(1, math.floor(exact[name] + 1e-9))) for name in sizes}
    for name in sorted(sizes, key=lambda name: (parts[name] - exact[name], name)):
        if sum(parts.values()) >= total:
            break
        parts[name] += parts[name] < spare[name]
    return parts
