"""What the runs of a sweep have in common, made once: `Common`.

Rows are read, divided and encoded once for all points that ask for the same; figures that need no training are found once.
The base is loaded once for each seed, since a new head is drawn while it is loaded; what is equal in two of them is one
tensor. Each run gets a tree of modules of its own around those tensors, so that a run is what it is alone: its adapter, its
hooks and its modes are nobody else's. Test rows pass over a frozen trunk as training rows do.

What is found by trying (which blocks are frozen, whether passing over them gives the same) is found once for runs whose
models are built alike. Adapters are read back into a base that was loaded from its files once more and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from afina.memory.storage import FLOATS
from afina.tasks.task import Rows
from afina.training import checkpoints
from afina.training.engines.engine import Engine
from afina.training.fast_path import fast_path
from afina.training.shared import Shared

__all__ = ["Common", "with_same_weights"]

Made = TypeVar("Made")


class Common(Shared):
    """Keeps what it made, for as long as the sweep lasts."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, str], Any] = {}
        self.first: dict[str, torch.Tensor] = {}  # frozen weights by name and shape, of the first base
        self.origins: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # what a tree was made from

    def once(self, what: str, about: Any, make: Callable[[], Made]) -> Made:
        key = (what, repr(about))
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]  # type: ignore[no-any-return]

    def base(self, task: Any, path: str, about: Any) -> Any:
        """A tree of modules around the one set of weights."""

        def load() -> tuple[Any, Any, dict[str, Any]]:
            model, learned = _loaded(task, path)
            chance = checkpoints.random_states()
            self._merge(model)
            return model, chance, learned

        model, chance, learned = self.once("base", about, load)
        _tell(task, learned)
        checkpoints.set_random_states(chance)
        made = with_same_weights(model)
        self.origins[made] = model
        return made

    def fresh(self, task: Any, path: str, about: Any) -> Any:
        """Loaded again once, and compared; after that what is known to be the same as in the files, unless it was written
        to since, be it behind torch's back."""

        def load() -> tuple[Any, dict[str, Any], list[tuple[torch.Tensor, int, int]]]:
            model, learned = _loaded(task, path)
            self._merge(model)
            return model, learned, [(t, t._version, _sum(t)) for t in (*model.parameters(), *model.buffers())]

        if task.storage.weights not in FLOATS:  # whose modules may change their own form as they compute
            return task.load_model(path)
        model, learned, seen = self.once("fresh base", about, load)
        if any(tensor._version != version or _sum(tensor) != total for tensor, version, total in seen):
            return task.load_model(path)
        _tell(task, learned)
        return with_same_weights(model)

    def bare(self, base: nn.Module) -> Any:
        """Once more the tree that a base was made as, without what has been done to it since."""
        return with_same_weights(self.origins[base])

    def _merge(self, model: nn.Module) -> None:
        """What is equal in the first base takes the place of what was loaded again."""
        for path, module in model.named_modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None or tensor.is_meta or type(tensor) not in (torch.Tensor, nn.Parameter):
                        continue
                    key = f"{path}.{name} {tuple(tensor.shape)} {tensor.dtype}"
                    known = self.first.setdefault(key, tensor)
                    if known is not tensor and torch.equal(known, tensor.to(known.device)):
                        held[name] = known  # type: ignore[assignment]

    def reading(self, run: Any, engine: Any) -> AbstractContextManager[Any]:
        return _trunk_for(run, engine)


@contextmanager
def _trunk_for(run: Any, engine: Any) -> Iterator[None]:
    """The states of the test rows, in the arithmetic that they are read in, are computed once for all runs."""
    test = run.rows["test"]
    sides = {"train": test, "validation": Rows(test.examples, test.features[:1])}  # one that is known
    exact = cast(Engine, _Exact(engine, run.task))
    once = partial(run.once, "the test rows", exact)
    with fast_path(run.model, run.task, sides, run.recipe.training, exact, once=once):
        yield


class _Exact:
    """An engine as it reads test rows: in float32, or in the type that the weights are stored in."""

    def __init__(self, engine: Any, task: Any):
        self.engine, self.task = engine, task
        self.precision = f"exact {task.storage}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic."""
        return self.task.storage.arithmetic(self.engine.device)  # type: ignore[no-any-return]


def _loaded(task: Any, path: str) -> tuple[Any, dict[str, Any]]:
    """The base, and what the task has learned while it was loaded: its attributes, those of `learned` by themselves."""
    before, known = dict(vars(task)), dict(task.learned)
    model = task.load_model(path)
    found = {k: v for k, v in vars(task).items() if k != "learned" and (k not in before or before[k] is not v)}
    return model, {**found, "learned": {k: v for k, v in task.learned.items() if k not in known or known[k] != v}}


def _tell(task: Any, learned: dict[str, Any]) -> None:
    """Let another task of the same kind know it."""
    vars(task).update({k: v for k, v in learned.items() if k != "learned"})
    task.learned |= copy.deepcopy(learned["learned"])


def _sum(tensor: torch.Tensor) -> int:
    """Of all bits, read as whole numbers: a write through `.data` or numpy leaves the version as it is, and this hardly
    ever. Takes no longer than to read the memory."""
    if tensor.is_meta:
        return 0
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    content = content.clone() if content.storage_offset() % 8 else content
    whole = len(content) // 8 * 8
    return int(content[:whole].view(torch.int64).sum() + content[whole:].sum())


def with_same_weights(model: nn.Module) -> Any:
    """A copy of the modules that holds the very tensors of the original."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
