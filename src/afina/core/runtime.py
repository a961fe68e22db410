"""What the next forward pass is to do, in one small object shared by all adapted layers of a model.

The state is set before a pass and read by the layers; nothing is carried by hooks registered per call. Under gradient
checkpointing the blocks are run again during backward, when the state may have moved on: `replayed` remembers the state
a block was first run with and restores it for the second run.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["BASE_ROW", "Rows", "Runtime", "State", "replayed"]

BASE_ROW = "__base__"  # PEFT's name for "this row of the batch uses no adapter"


class Rows:
    """Which adapter each row of a batch uses; worked out once, read by every layer.

    A layer may see every row several times in a run (beams, tokens flattened into rows); consecutive copies belong
    together, as `repeat_interleave` makes them. `distinct` are the adapters by their first row, BASE_ROW among them.
    The batch is divided into `units` of equally many consecutive rows, each of one adapter and as long as the order of
    the rows allows; `places` gives the adapter of each as a number in `distinct`.

    `steady` is a promise that no adapter changes while these rows are in use, as within one call of `generate`: layers may
    then keep in `kept` what they worked out of the adapters, where no gradients are taken.
    """

    def __init__(self, names: Sequence[str], *, steady: bool = False):
        self.names = tuple(names)
        self.kept: dict[Any, Any] | None = {} if steady else None
        places: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            places.setdefault(name, []).append(row)
        self.groups = {name: torch.tensor(rows) for name, rows in places.items()}
        self.distinct = tuple(places)
        runs = [len([*run]) for _, run in itertools.groupby(self.names)]
        length = math.gcd(*runs) or 1
        number = {name: i for i, name in enumerate(self.distinct)}
        self.places = tuple(number[name] for name in self.names[::length])
        self.units = len(self.places)
        self.whole = self.units == len(self.distinct)  # a unit an adapter, in order
        self.sorted = len(runs) == len(self.distinct)

    def index(self, name: str, size: int, device: torch.device) -> torch.Tensor | slice:
        """Where the rows of adapter `name` are in a leading dimension of `size`: a slice where they follow one another,
        else their positions (int64, on `device`)."""
        copies = size // len(self.names)
        rows = self.groups[name]
        if self.sorted:
            start = int(rows[0]) * copies
            return slice(start, start + len(rows) * copies)
        rows = rows.to(device, non_blocking=True)
        if copies == 1:
            return rows
        return (rows[:, None] * copies + torch.arange(copies, device=device)).flatten()

    def back(self, size: int, device: torch.device) -> torch.Tensor:
        """Where each row is once rows lie adapter by adapter, as `distinct` has them (int64, on `device`)."""
        copies = size // len(self.names)
        order = [row * copies + i for rows in self.groups.values() for row in rows.tolist() for i in range(copies)]
        return torch.tensor(order, device=device).argsort()

    def adapter_of(self, parts: int, device: torch.device) -> torch.Tensor:
        """The adapter of each of `parts` equal parts of the batch, as a number in `distinct` (int64, on `device`)."""
        return torch.tensor(self.places, device=device).repeat_interleave(parts // self.units)


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
        self.chosen: tuple[str, ...] | None = None  # the names whose adapters layers have in `chosen`, None for none
        self.by_choice = False  # whether these are the active ones

    def set(self, **changes: Any) -> None:
        """Replace fields of the state."""
        self._enter(replace(self.state, **changes))

    def choose(self, names: tuple[str, ...] | None) -> None:
        """Layers have the adapters of these names in `chosen`, in order; None: what they have there is not to be used."""
        self.chosen = names
        self._enter(self.state)

    def _enter(self, state: State) -> None:
        self.state, self.by_choice = state, state.active == self.chosen

    @contextmanager
    def using(self, state: State) -> Iterator[None]:
        """The given state inside the block, the present one after it."""
        before = self.state
        self._enter(state)
        try:
            yield
        finally:
            self._enter(before)


class replayed:
    """A checkpoint function that runs its block under the state of the first run, each time."""

    def __init__(self, checkpoint: Callable[..., Any], runtime: Runtime):
        self.checkpoint, self.runtime = checkpoint, runtime

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(functools.partial(self._run, block, self.runtime.state), *args, **kwargs)

    def _run(self, block: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
        with self.runtime.using(state):
            return block(*args, **kwargs)
