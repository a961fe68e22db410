"""Floating-point Parameters, and storages that afina cannot look into."""

from __future__ import annotations

import torch
from torch import nn

from afina.core.codecs.codec import WeightCodec
from afina.errors import MergeError

__all__ = ["Opaque", "Plain"]


class Plain(WeightCodec):
    """A floating-point Parameter named `weight`."""

    name, exact = "plain", True

    def matches(self, layer: nn.Module) -> bool:
        weight = layer._parameters.get("weight")
        return weight is not None and weight.dtype.is_floating_point and type(weight) is nn.Parameter

    def read(self, layer: nn.Module) -> torch.Tensor:
        return layer._parameters["weight"]  # type: ignore[return-value]

    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        old = layer._parameters["weight"]
        assert old is not None
        layer._parameters["weight"] = nn.Parameter(weight.to(old.device, old.dtype).contiguous(), requires_grad=False)


class Opaque(WeightCodec):
    """A storage afina cannot write (DTensor shards, quantised formats without a row here): used, never merged."""

    name = "opaque"

    def __init__(self, known: tuple[WeightCodec, ...]):
        self.known = known

    def matches(self, layer: nn.Module) -> bool:
        return True

    def read(self, layer: nn.Module) -> torch.Tensor:
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and type(weight).__module__.startswith("torchao."):
            return weight.dequantize()
        if isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point:
            return weight
        raise MergeError(
            f"the weight of this {type(layer).__name__} is stored in a form afina cannot read; "
            f"known storages: {', '.join(codec.name for codec in self.known)}"
        )

    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        raise MergeError(
            f"the weight of this {type(layer).__name__} ({type(getattr(layer, 'weight', None)).__name__}) is stored in a "
            f"form afina cannot write; known storages: {', '.join(codec.name for codec in self.known)}"
        )
