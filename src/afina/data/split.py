"""Divides examples into train, validation and test, class by class, the same way for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["stratified"]


def stratified(
    labels: Sequence[str], *, validation: float = 0.1, test: float = 0.2, seed: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """Indices of the train, validation and test rows, each in ascending order.

    `validation` and `test` are shares of each class, rounded; every class has at least one row on every side, so each
    needs at least three.
    """
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chance = random.Random(seed)
    train: list[int] = []
    validating: list[int] = []
    testing: list[int] = []
    for label in sorted(members):
        rows = members[label]
        if len(rows) < 3:
            raise ValueError(f"class {label!r} has {len(rows)} rows; at least 3 are needed")
        chance.shuffle(rows)
        n_test = min(max(1, round(test * len(rows))), len(rows) - 2)
        n_validation = min(max(1, round(validation * len(rows))), len(rows) - n_test - 1)
        testing += rows[:n_test]
        validating += rows[n_test : n_test + n_validation]
        train += rows[n_test + n_validation :]
    return sorted(train), sorted(validating), sorted(testing)
