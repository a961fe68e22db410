"""Groups that share a member are one group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["Union", "joined"]


class Union:
    """Which of the numbers 0, 1, ... belong together, as pairs of them are joined."""

    def __init__(self, size: int):
        self.above = list(range(size))

    def root(self, i: int) -> int:
        """The number that stands for the group of `i`."""
        while self.above[i] != i:
            self.above[i] = self.above[self.above[i]]
            i = self.above[i]
        return i

    def join(self, i: int, j: int) -> None:
        """From now on `i` and `j` belong together."""
        self.above[self.root(i)] = self.root(j)

    def groups(self) -> list[list[int]]:
        """Groups of two and more, each ascending."""
        found: dict[int, list[int]] = {}
        for i in range(len(self.above)):
            found.setdefault(self.root(i), []).append(i)
        return [group for group in found.values() if len(group) > 1]


def joined(groups: Iterable[Sequence[int]]) -> list[list[int]]:
    """The groups that come of joining all that share a member, each ascending."""
    groups = list(groups)
    members = sorted({i for group in groups for i in group})
    place = {i: k for k, i in enumerate(members)}
    union = Union(len(members))
    for group in groups:
        for i in group[1:]:
            union.join(place[group[0]], place[i])
    return [[members[k] for k in group] for group in union.groups()]
