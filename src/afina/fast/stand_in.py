"""A function of torch that another stands in for while any of some blocks is entered; they may be left in any order, as runs
of a sweep do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["StandIn"]


class StandIn:
    """`place.name` and who stands in for it. `given` is what stood there before."""

    def __init__(self, place: Any, name: str):
        self.place, self.name = place, name
        self.given: Callable[..., Any] = getattr(place, name)
        self._inside = 0

    @contextmanager
    def by(self, other: Callable[..., Any]) -> Iterator[None]:
        """Inside the block `other` is called; it may call `given`."""
        if not self._inside:
            self.given = getattr(self.place, self.name)
        self._inside += 1
        setattr(self.place, self.name, other)
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                setattr(self.place, self.name, self.given)
