"""What the next forward pass is to do, in one small object shared by all adapted layers of a model.

The state is set before a pass and read by the layers; nothing is carried by hooks registered per call. Under gradient
checkpointing the blocks are run again during backward, when the state may have moved on: `replayed` remembers the state
a block was first run with and restores it for the second run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["BASE_ROW", "Rows", "Runtime", "State", "replayed"]

BASE_ROW = "__base__"  # PEFT's name for "this row of the batch uses no adapter"


class Rows:
    """Which adapter each row of a batch uses.

    A layer may see every row several times in a run (beams, tokens flattened into rows); consecutive copies belong
    together, as `repeat_interleave` makes them.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        places: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            places.setdefault(name, []).append(row)
        self.groups = {name: torch.tensor(rows) for name, rows in places.items()}

    def index(self, name: str, size: int, device: torch.device) -> torch.Tensor:
        """Positions (int64, on `device`) of the rows of adapter `name` in a leading dimension of `size`."""
        copies = size // len(self.names)
        rows = self.groups[name].to(device, non_blocking=True)
        if copies == 1:
            return rows
        return (rows[:, None] * copies + torch.arange(copies, device=device)).flatten()


@dataclass(frozen=True, slots=True)
class State:
    """Active adapters in the order they are applied, rows of a mixed batch (or None), whether adapters act at all, and
    the prefix keys and values of this pass: per layer a pair `[heads, n, head_dim]`."""

    active: tuple[str, ...] = ()
    rows: Rows | None = None
    enabled: bool = True
    prefix: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None


class Runtime:
    """Holder of the current `State`."""

    def __init__(self) -> None:
        self.state = State()

    def set(self, **changes: Any) -> None:
        """Replace fields of the state."""
        self.state = replace(self.state, **changes)

    @contextmanager
    def using(self, state: State) -> Iterator[None]:
        """The given state inside the block, the present one after it."""
        before, self.state = self.state, state
        try:
            yield
        finally:
            self.state = before


class replayed:
    """A checkpoint function that runs its block under the state of the first run, each time."""

    def __init__(self, checkpoint: Callable[..., Any], runtime: Runtime):
        self.checkpoint, self.runtime = checkpoint, runtime

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(functools.partial(self._run, block, self.runtime.state), *args, **kwargs)

    def _run(self, block: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
        with self.runtime.using(state):
            return block(*args, **kwargs)
