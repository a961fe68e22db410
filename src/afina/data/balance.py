"""Makes classes count alike: by leaving rows out, by repeating them, or by weights in the loss.

It is done to the training rows alone (T28): repeated before the split, a row would stand on both sides of it, and a test
side whose classes were made alike says nothing of the world the model will work in.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

__all__ = ["class_weights", "oversampled", "undersampled"]


def undersampled(labels: Mapping[int, str], seed: int) -> list[int]:
    """As many rows of each class as the rarest has, drawn by chance, ascending. `labels` are by the number of the row."""
    members = _members(labels)
    least = min(map(len, members.values()))
    chance = random.Random(seed)
    return sorted(i for name in sorted(members) for i in chance.sample(members[name], least))


def oversampled(labels: Mapping[int, str], seed: int) -> list[int]:
    """All rows, and those of rarer classes again until each class has as many as the commonest; ascending, with repeats.

    Rows of a class are repeated equally often, give or take one.
    """
    members = _members(labels)
    most = max(map(len, members.values()))
    chance = random.Random(seed)
    rows: list[int] = []
    for name in sorted(members):
        times, rest = divmod(most, len(members[name]))
        rows += members[name] * times + chance.sample(members[name], rest)
    return sorted(rows)


def class_weights(labels: Iterable[str]) -> dict[str, float]:
    """n / (k * count) of each class: rows weigh 1 on average, and classes alike."""
    members = _members(dict(enumerate(labels)))
    rows = sum(map(len, members.values()))
    return {name: rows / (len(members) * len(own)) for name, own in sorted(members.items())}


def _members(labels: Mapping[int, str]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for i, label in labels.items():
        members.setdefault(label, []).append(i)
    return members
