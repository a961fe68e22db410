"""Divides examples into train, validation and test, class by class, the same way for the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from afina.errors import DataError

__all__ = ["stratified"]


def stratified(
    labels: Sequence[str],
    *,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    groups: Sequence[Sequence[int]] = (),
) -> tuple[list[int], list[int], list[int]]:
    """Indices of the train, validation and test rows, each in ascending order.

    `validation` and `test` are shares of each class, rounded; every class has at least one row on every side, so each
    needs at least three. Indices of one of the `groups` stay together: on a side that has room for all of them, else in
    train.
    """
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chance = random.Random(seed)
    room: list[dict[str, int]] = [{}, {}]  # rows of each class that validation and test still take
    for label, rows in members.items():
        if len(rows) < 3:
            raise ValueError(f"class {label!r} has {len(rows)} rows; at least 3 are needed")
        room[1][label] = min(max(1, round(test * len(rows))), len(rows) - 2)
        room[0][label] = min(max(1, round(validation * len(rows))), len(rows) - room[1][label] - 1)
    sides: list[list[int]] = [[], [], []]
    grouped = {index for group in groups for index in group}
    for group in chance.sample(list(groups), len(groups)):
        needed = Counter(labels[index] for index in group)
        side = chance.choices((0, 1, 2), weights=(1 - validation - test, validation, test))[0]
        if side and any(count > room[side - 1][label] for label, count in needed.items()):
            side = 0
        sides[side] += group
        if side:
            for label, count in needed.items():
                room[side - 1][label] -= count
    for label in sorted(members):
        rows = [index for index in members[label] if index not in grouped]
        chance.shuffle(rows)
        n_test, n_validation = room[1][label], room[0][label]
        sides[2] += rows[:n_test]
        sides[1] += rows[n_test : n_test + n_validation]
        sides[0] += rows[n_test + n_validation :]
        for side, name in enumerate(("train", "validation", "test")):
            if not any(labels[index] == label for index in sides[side]):
                raise DataError(f"class {label!r} has too few different texts for a row of it in {name}; add some")
    return sorted(sides[0]), sorted(sides[1]), sorted(sides[2])
