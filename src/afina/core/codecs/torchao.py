"""torchao's int8 weight-only storage: `Int8Tensor`, int8 rows with one scale each.

torchao's own product keeps the whole weight in floating point for backward; a layer made ready here computes the same
bits and keeps what is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from afina.core.codecs.codec import WeightCodec
from afina.core.codecs.rows import int8_rows, row_linear

__all__ = ["Int8Linear", "TorchAOInt8"]


class Int8Linear(nn.Linear):
    """A linear layer whose weight is an `Int8Tensor`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        return row_linear(x, weight.qdata, weight.scale.flatten(), self.bias)


class TorchAOInt8(WeightCodec):
    """Weight-only int8 with one scale a row; with quantised activations there is no backward, and it is left opaque."""

    name = "torchao int8"

    def matches(self, layer: nn.Module) -> bool:
        weight: Any = layer._parameters.get("weight")
        if type(weight).__name__ != "Int8Tensor" or not type(weight).__module__.startswith("torchao."):
            return False
        rows = weight.dim() == 2 and tuple(weight.block_size) == (1, weight.shape[-1])
        return rows and weight.act_quant_kwargs is None and weight.act_pre_scale is None

    def prepare(self, layer: nn.Module) -> None:
        if type(layer) is nn.Linear:
            layer.__class__ = Int8Linear
            layer.__dict__.pop("extra_repr", None)  # torchao's own, which cannot be pickled

    def read(self, layer: Any) -> torch.Tensor:
        weight = layer.weight
        return weight.qdata.float() * weight.scale.float().reshape(-1, 1)  # type: ignore[no-any-return]

    def write(self, layer: Any, weight: torch.Tensor) -> None:
        old = layer.weight
        rows, scale = int8_rows(weight.detach().to(old.device), old.scale.flatten())
        made = type(old)(
            rows, scale.reshape(old.scale.shape).to(old.scale.dtype), list(old.block_size), old.dtype,
            zero_point=old.zero_point,
        )  # fmt: skip
        layer._parameters["weight"] = nn.Parameter(made, requires_grad=False)
