"""What a forward pass keeps for backward: nothing that backward can cheaply compute again, and nothing wider than it is.

Autograd asks before it keeps a tensor (`saved_tensors_hooks`). Where the tensor is the product of two others, an activation
function or a norm of another, backward computes it again when it comes there, out of what those operations keep
themselves, with the same kernels and so with the same bits (a layer norm: to rounding). A gated feed-forward block keeps
two tensors then and not four; the input that a low-rank product keeps behind a norm costs nothing. Where a tensor came from
a narrower type, the narrow one is kept, which loses nothing. Matrix products and attention are never computed again: for
that there is gradient checkpointing, whose blocks keep their inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol
from weakref import WeakValueDictionary, ref

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Mover", "keep_less"]

_SMALLEST = 1 << 15  # bytes; less is not worth the work
_DEEPEST = 6  # operations that are computed again for one tensor

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_OF_SAVED: dict[str, Callable[[Any], torch.Tensor]] = {
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "_TanhGeluBackward": lambda node: F.gelu(node.saved_tensors[0], approximate="tanh"),  # of fast/gelu.py
    "NativeLayerNormBackward0": lambda node: _layer_norm(node),
}


class Mover(Protocol):
    """Who takes what is kept somewhere else."""

    def begin(self, model: nn.Module) -> None:
        """A forward pass begins."""

    def pack(self, tensor: torch.Tensor) -> Any:
        """What is kept in the place of a tensor."""

    def unpack(self, kept: Any) -> torch.Tensor:
        """The tensor again."""


def keep_less(model: nn.Module, mover: Mover | None = None, *, in_blocks: bool = False) -> None:
    """From now on each forward pass of `model` under gradients keeps only what has to be kept; `mover` takes that away.

    `in_blocks`: checkpointed blocks keep nothing, so nothing outside can be computed again out of what they keep.
    """
    entered: list[ExitStack] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack = ExitStack()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if mover is not None:
                mover.begin(model)
            keeping = _Keeping(mover, again=not in_blocks)
            stack.enter_context(saved_tensors_hooks(keeping.pack, keeping.unpack))
        entered.append(stack)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop().close()

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


class _Again:
    """A tensor that a node of the graph can give again. A node keeps its inputs until its own backward, which comes after
    that of all who use its output. It is computed once for all who keep it, and stays until the last of them has it."""

    __slots__ = ("__weakref__", "node", "readers", "shape", "value")

    def __init__(self, node: Any, shape: torch.Size):
        self.node, self.shape, self.readers = node, shape, 0
        self.value: torch.Tensor | None = None

    def taken(self) -> torch.Tensor:
        """The tensor, for one of its readers."""
        value = _value(self.node).reshape(self.shape) if self.value is None else self.value  # strides may be others
        self.readers -= 1
        self.value = value if self.readers > 0 else None
        return value


class _Narrow:
    """A tensor in the narrower type that its values came from."""

    __slots__ = ("__weakref__", "dtype", "kept")

    def __init__(self, kept: Any, dtype: torch.dtype):
        self.kept, self.dtype = kept, dtype


class _Keeping:
    """Of one forward pass."""

    def __init__(self, mover: Mover | None, *, again: bool):
        self.mover, self.again = mover, again
        self.narrowed: dict[int, tuple[ref[torch.Tensor], ref[_Narrow]]] = {}
        self.given: WeakValueDictionary[int, _Again] = WeakValueDictionary()  # by the id of the node

    def pack(self, tensor: torch.Tensor) -> Any:
        node = tensor.grad_fn
        if node is None or tensor.output_nr or tensor.nbytes < _SMALLEST or not tensor.is_floating_point():
            return self._moved(tensor)
        if self.again and _gives(node):
            made = self.given.get(id(node))
            if made is None or made.shape != tensor.shape:
                made = self.given[id(node)] = _Again(node, tensor.shape)
            made.readers += 1
            return made
        if node.name() == "ToCopyBackward0":
            source = _made_by(node.next_functions[0])
            if source is not None and source.itemsize < tensor.dtype.itemsize and source.is_floating_point:
                return self._narrow(tensor, source)
        return self._moved(tensor)

    def unpack(self, kept: Any) -> torch.Tensor:
        with torch.no_grad():
            if isinstance(kept, _Again):
                return kept.taken()
            if isinstance(kept, _Narrow):
                return self._back(kept.kept).to(kept.dtype)
            return self._back(kept)

    def _narrow(self, tensor: torch.Tensor, dtype: torch.dtype) -> _Narrow:
        """The same one for all who ask to keep this tensor."""
        known = self.narrowed.get(id(tensor))
        if known is not None and known[0]() is tensor and (made := known[1]()) is not None:
            return made
        with torch.no_grad():
            made = _Narrow(self._moved(tensor.to(dtype)), tensor.dtype)
        self.narrowed[id(tensor)] = (ref(tensor), ref(made))
        return made

    def _moved(self, tensor: torch.Tensor) -> Any:
        return tensor.detach() if self.mover is None else self.mover.pack(tensor)

    def _back(self, kept: Any) -> torch.Tensor:
        return kept if self.mover is None else self.mover.unpack(kept)


def _made_by(edge: Any) -> torch.dtype | None:
    """The type of what a node puts out at an edge."""
    node, number = edge
    return None if node is None else node._input_metadata[number].dtype


def _gives(node: Any, depth: int = 0) -> bool:
    """Whether the output of a node can be computed again from what it and those before it keep."""
    if node is None or depth > _DEEPEST:
        return False
    name = node.name()
    if name in _OF_SAVED:
        return True
    if name in _VIEWS:
        return _gives(node.next_functions[0][0], depth + 1)
    if name == "ToCopyBackward0":
        return _gives(node.next_functions[0][0], depth + 1)
    if name != "MulBackward0":
        return False
    (one, at), (other, at_other) = node.next_functions
    if one is not None and other is not None:  # each is kept for the other's gradient
        return True
    return _gives(one, depth + 1) and not at if other is None else _gives(other, depth + 1) and not at_other


def _value(node: Any) -> torch.Tensor:
    """The output of a node of which `_gives` is true."""
    name = node.name()
    if name in _OF_SAVED:
        return _OF_SAVED[name](node)
    made = node._input_metadata[0]
    if name in _VIEWS:
        return _value(node.next_functions[0][0]).reshape(tuple(made.shape))
    if name == "ToCopyBackward0":
        return _value(node.next_functions[0][0]).to(made.dtype)
    (one, _), (other, _) = node.next_functions
    left = node._saved_self if other is not None else _value(one)
    return left * (node._saved_other if one is not None else _value(other))


def _layer_norm(node: Any) -> torch.Tensor:
    made = (node._saved_input - node._saved_result1) * node._saved_result2
    weight, bias = node._saved_weight, node._saved_bias
    made = made if weight is None else made * weight
    made = made if bias is None else made + bias
    return made.to(node._input_metadata[0].dtype)
