"""What runs of one process have in common: `Shared`.

A run by itself has nothing in common with others, and everything is made for it alone. The runs of a sweep are given one
`Shared` that keeps what it made (`afina/sweep/common.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

__all__ = ["Shared"]

Made = TypeVar("Made")


class Shared:
    """Nothing is kept here."""

    def once(self, what: str, about: Any, make: Callable[[], Made]) -> Made:
        """What `make` makes; the same for the same `what` and `about`, whose text is compared."""
        return make()

    def base(self, task: Any, path: str, about: Any) -> Any:
        """The base model, whose frozen weights may be those of other runs; random numbers are drawn as by loading it."""
        return task.load_model(path)

    def fresh(self, task: Any, path: str, about: Any) -> Any:
        """The base model as its files have it, to read an adapter back into."""
        return task.load_model(path)

    def reading(self, run: Any, engine: Any) -> AbstractContextManager[Any]:
        """Around the reading of the test rows."""
        return nullcontext()
