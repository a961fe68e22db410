"""What a stretch of computation holds in memory, followed without computing it.

The code runs as it is, on tensors that have shapes and no contents (torch's fake tensors), and every storage is followed
from the operation that makes it to the moment its last holder lets it go. So checkpointing, losses in chunks, casts under
autocast and what a custom node keeps for backward are seen by what they do, not by a formula for each architecture.
Small whole-number tensors (ids, masks, labels) keep their values, since code asks for them: whether a mask is full, which
places are targets.

What an operation takes inside itself and gives back before it returns cannot be seen this way; `hidden` adds it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from afina.memory.allocators import Allocator

__all__ = ["PARTS", "Held", "Trace", "faked"]

PARTS = ("weights", "adapters", "gradients", "optimizer", "copies", "activations", "logits", "workspace")
_FOLLOWED = 1 << 22  # elements of a whole-number tensor whose values are kept
_MADE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")  # contents that mean nothing
_DEVICE = torch.ops.prim.device.default
_MASKS = (torch.bool, torch.uint8)
_MANY = 10**9


@dataclass(eq=False)
class Piece:
    """One storage: bytes, the ticks at which it came and went, and what it is for."""

    size: int
    born: int
    died: int = _MANY
    part: str = ""


@dataclass
class Held:
    """What is alive at one moment: bytes by part, and the phase the moment lies in."""

    phase: str = ""
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return sum(self.parts.values())


class Trace(TorchDispatchMode):
    """Follows every storage that is made while it is entered.

    `hidden(operation, arguments, result)` says how many bytes an operation takes inside; `wide` is a size (the
    vocabulary's) by which logits are known.
    """

    def __init__(
        self,
        *,
        hidden: Callable[[Any, Sequence[Any], Any], int] = lambda operation, arguments, result: 0,
        wide: int = 0,
    ):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.hidden, self.wide = hidden, wide
        self.pieces: list[Piece] = []
        self.known: dict[int, Piece] = {}
        self.kept: list[Any] = []  # tensors that are to live as long as the trace
        self.tick = 0
        self.phases: list[tuple[int, str]] = []

    def __enter__(self) -> Trace:
        self.fake.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.fake.__exit__(*error)

    # --- what is followed

    def follow(self, tensors: Iterable[Any], part: str = "") -> None:
        """Know the storages of tensors, and what they are for."""
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            piece = self.known.get(key)
            if piece is None:
                size = storage.nbytes()
                piece = self.known[key] = Piece(size, self.tick)
                self.pieces.append(piece)
                weakref.finalize(storage, self._let_go, key, piece).atexit = False
                if self.wide and tensor.dim() > 1 and tensor.dtype.is_floating_point and tensor.shape[-1] == self.wide:
                    piece.part = "logits"
            if part:
                piece.part = part

    def _let_go(self, key: int, piece: Piece) -> None:
        piece.died = self.tick
        if self.known.get(key) is piece:
            del self.known[key]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is born while a phase lasts and outlives it counts as kept for backward, where the phase is `forward`."""
        first, before = len(self.pieces), self.phases[-1][1] if self.phases else ""
        self.phases.append((self.tick, name))
        yield
        if name == "forward":
            for piece in self.pieces[first:]:
                if piece.died == _MANY and not piece.part:
                    piece.part = "activations"
        self.phases.append((self.tick, before))

    # --- the operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        values = [_value(x) for x in given]
        known = all(v is not None for v in values)
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            return _computed(func, args, kwargs) if known else _guess(given[0].dtype)
        real: Any = None
        if name == "index":
            args = (args[0], [y for x in args[1] for y in self._places(x)])
            result = func(*args)
        elif not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags):
            if not known:
                raise NotImplementedError(f"{func}: what it returns depends on values that are not known before the run")
            real = _computed(func, args, kwargs)
            if not any(isinstance(x, torch.Tensor) for x in tree_iter(real)):
                return real
            result = tree_map_only(torch.Tensor, torch.empty_like, real)
        else:
            result = func(*args, **kwargs)
        self.tick += 1
        if real is None:
            real = self._followed(func, name, args, kwargs, given, known, result)
        if real is not None:
            _know(result, real)
        made = list(tree_iter(result))
        inside = self.hidden(func, given, result)
        if inside:
            self.pieces.append(Piece(inside, self.tick, self.tick, "workspace"))
        self.follow(made)
        if torch.is_grad_enabled() and self.phases and self.phases[-1][1] == "backward":  # blocks computed again
            for tensor in made:
                if isinstance(tensor, FakeTensor) and not self.known[tensor.untyped_storage()._cdata].part:
                    self.known[tensor.untyped_storage()._cdata].part = "activations"
        return result

    def _places(self, index: Any) -> tuple[Any, ...]:
        """An index as it is, or where a mask says yes: what indexing by a mask does inside."""
        if index is None or index.dtype not in _MASKS:
            return (index,)
        if _value(index) is None:
            raise NotImplementedError("what indexing by a mask returns depends on values that are not known before the run")
        found = _computed(torch.ops.aten.nonzero.default, (index,), {})
        return tuple(faked(self, column) for column in found.unbind(1))

    def _followed(self, func: Any, name: str, args: Any, kwargs: Any, given: Any, known: bool, result: Any) -> Any:
        """The values of a whole-number result, where all it was made from is known."""
        tensors = [x for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        whole = all(not x.dtype.is_floating_point and x.numel() <= _FOLLOWED for x in tensors)
        if known and tensors and whole and name not in _MADE and torch.Tag.nondeterministic_seeded not in func.tags:
            return _computed(func, args, kwargs)
        if func._schema.is_mutable:
            for x in given:
                if isinstance(x, FakeTensor):
                    x.value = None  # type: ignore[attr-defined]
        return None

    # --- what was found

    def peak(self, *phases: str, allocator: Allocator | None = None, outside: str = "weights") -> Held:
        """The moment at which most is alive, in all phases or in those named.

        With an allocator, the moment at which it holds most; what is free in it then is the part `allocator`. Parts whose
        name begins with `outside` are not taken from it.
        """
        last = self.tick + 2
        alive, spare = [0] * last, [0] * last
        births: dict[int, list[Piece]] = {}
        deaths: dict[int, list[Piece]] = {}
        for piece in self.pieces:
            births.setdefault(piece.born, []).append(piece)
            deaths.setdefault(piece.died, []).append(piece)
        blocks: dict[Piece, int] = {}
        for again in (False, True) if allocator is not None else (True,):  # an allocator is as the step before has left it
            now = inside = sum(map(_size, blocks))
            for tick in range(last):
                for piece in births.get(tick, ()):
                    if piece in blocks:
                        continue
                    now += piece.size
                    if allocator is not None and not piece.part.startswith(outside):
                        blocks[piece] = allocator.take(piece.size)
                        inside += piece.size
                if again:
                    alive[tick] = now
                    if allocator is not None:
                        spare[tick] = max(0, allocator.held - inside)
                for piece in deaths.get(tick, ()):  # what an operation is given is there until it has returned
                    now -= piece.size
                    if piece in blocks:
                        allocator.give(blocks.pop(piece))  # type: ignore[union-attr]
                        inside -= piece.size
        spans = [(a + 1, b, name) for (a, name), (b, _) in pairwise([*self.phases, (last, "")])]
        ticks = [t for a, b, name in spans if not phases or name in phases for t in range(a, min(b + 1, last))]
        when = max(ticks, key=lambda t: (alive[t] + spare[t], alive[t]), default=0)
        parts: Counter[str] = Counter()
        for piece in self.pieces:
            if piece.born <= when <= piece.died:
                parts[piece.part or "workspace"] += piece.size
        if spare[when]:
            parts["allocator"] = spare[when]
        return Held(next((name for a, b, name in spans if a <= when <= b), ""), dict(parts))


def faked(trace: Trace, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in a trace: of a real one its shape and, where it holds whole numbers, its values; of an empty one its
    shape."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if tensor.device.type != "meta" and not tensor.dtype.is_floating_point:
        with torch.utils._python_dispatch._disable_current_modes():
            made.value = tensor.clone()  # type: ignore[attr-defined]
    return made


def _size(piece: Piece) -> int:
    return piece.size


def _value(tensor: torch.Tensor) -> torch.Tensor | None:
    return getattr(tensor, "value", None) if isinstance(tensor, FakeTensor) else tensor


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the values themselves, outside of every mode."""
    real_args, real_kwargs = tree_map_only(torch.Tensor, _value, (args, kwargs))
    with torch.utils._python_dispatch._disable_current_modes():
        if "device" in real_kwargs:
            real_kwargs = {**real_kwargs, "device": torch.device("cpu")}
        return func(*real_args, **real_kwargs)


def _know(result: Any, real: Any) -> None:
    for fake, value in zip(tree_iter(result), tree_iter(real), strict=True):
        if isinstance(fake, FakeTensor) and isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
            fake.value = value  # type: ignore[attr-defined]


def _guess(dtype: torch.dtype) -> Any:
    """A number nothing is known of: a loss that is finite, a norm that is not zero."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
