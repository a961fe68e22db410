"""Frozen weights held in the type of the arithmetic for the length of training.

Autocast casts a float32 weight to 16 bits whenever a layer is called, and keeps the copy for the rest of a pass only where
the weight is trained. A frozen one is cast in every forward and again in every backward: with rows of a dozen tokens that
is a quarter of a step. Here the copy is made once and stands in the layer meanwhile. It is the tensor that autocast would
have made, so nothing changes, not even in the last bit; what it costs is half of these weights again. Layers whose
adapter reads the weight in full keep it, and so does all that is no matrix product.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from afina.core.adapted import AdaptedLayer
from afina.methods.lora import LoRA

__all__ = ["ready_bytes", "ready_weights"]

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MADE: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[nn.Parameter]]] = {}  # original and copy, by the first's id


@contextmanager
def ready_weights(
    model: nn.Module, dtype: torch.dtype, *, without: Collection[nn.Module] = ()
) -> Iterator[list[torch.Tensor]]:
    """Inside the block frozen float32 weights of matrix products are held in `dtype`, which autocast is to compute in; gives
    the copies. What was there comes back at the end, the same objects. `without`: modules that are not computed."""
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    try:
        for module, name, held in _wide(model, dtype, without):
            before.append((module, name, held))
            made[id(held)] = module._parameters[name] = _copy(held, dtype)
        yield list(made.values())
    finally:
        for module, name, held in before:
            module._parameters[name] = held


def ready_bytes(model: nn.Module, dtype: torch.dtype, *, without: Collection[nn.Module] = ()) -> int:
    """Bytes that the copies take."""
    held = {id(p): p.numel() for _, _, p in _wide(model, dtype, without)}
    return sum(held.values()) * dtype.itemsize


def _copy(held: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """One for all who share the weight, in whatever model."""
    known = _MADE.get(id(held))
    copy = known[1]() if known is not None and known[0]() is held else None
    if copy is None or copy.dtype != dtype:
        copy = nn.Parameter(held.detach().to(dtype), requires_grad=False)
        _MADE[id(held)] = weakref.ref(held), weakref.ref(copy)
    return copy


def _wide(model: nn.Module, dtype: torch.dtype, without: Collection[nn.Module]) -> Iterator[tuple[Any, str, nn.Parameter]]:
    """Float32 weights and biases of layers that are a matrix product, frozen, with adapters that are content with the
    product."""
    if dtype == torch.float32:
        return
    kept = {id(m) for part in without for m in part.modules()}
    for layer in model.modules():
        if isinstance(layer, AdaptedLayer) and any(type(adapter) is not LoRA for adapter in layer.adapters.values()):
            kept.update(id(m) for m in layer.modules())
    for module in model.modules():
        if (type(module) in _PRODUCTS or type(module).__name__ == "Conv1D") and id(module) not in kept:
            found = {name: p for name in ("weight", "bias") if (p := module._parameters[name]) is not None}
            if all(type(p) in (nn.Parameter, FakeTensor) and not p.requires_grad for p in found.values()):
                yield from ((module, name, p) for name, p in found.items() if p.dtype == torch.float32)
