"""Quantised layers without contents: the shapes they store, and the temporaries of their kernels, for plans of memory.

An outline stands where a linear layer stood and computes as the layer does that loading makes (`lean`): int8 rows by the
same function, 4-bit blocks by writing the weight out, forward and backward. So a plan needs neither weights nor bitsandbytes
or torchao.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from afina.core.codecs.codec import WeightCodec
from afina.core.codecs.rows import compute_dtype, row_linear
from afina.errors import MergeError

__all__ = ["OutlineLinear", "Outlined"]

_ROWS = ("int8", "int8_weight_only")  # stored as rows of int8
_BLOCK = 64  # values of a 4-bit weight that share a scale


class OutlineLinear(nn.Linear):
    """A linear layer `[out, in]` whose weight is stored as `kind` says, without contents: int8, int8_weight_only, and every
    other kind as blocks of 4-bit values. `dtype` is that of the weight it was made from.
    """

    def __init__(self, n_out: int, n_in: int, kind: str, dtype: torch.dtype, device: Any, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind, self.dtype = n_in, n_out, kind, dtype
        if kind not in _ROWS:
            stored = torch.empty((n_out * n_in + 1) // 2, 1, dtype=torch.int8, device=device)
            scales = torch.empty(-(-n_out * n_in // _BLOCK), dtype=torch.float32, device=device)
        else:
            stored = torch.empty(n_out, n_in, dtype=torch.int8, device=device)
            scales = torch.empty(n_out, dtype=torch.float32 if kind == "int8" else dtype, device=device)
        weight: Any = nn.Parameter(stored, requires_grad=False)
        weight.quant_state = SimpleNamespace(shape=(n_out, n_in))  # it counts as the values that it stands for
        self.weight = weight
        self.register_parameter("bias", bias)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        scales: Any = self.scales
        if self.kind in _ROWS:
            return row_linear(x, self.weight, scales / 127.0 if self.kind == "int8" else scales, self.bias)
        x = x.to(compute_dtype(x))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Blocks.apply(x, bias, self)  # type: ignore[no-any-return,no-untyped-call]

    def written_out(self, dtype: torch.dtype) -> torch.Tensor:
        """A weight of the right shape."""
        return self.weight.new_empty((self.out_features, self.in_features), dtype=dtype)


class _Blocks(torch.autograd.Function):
    """A product with 4-bit blocks; backward writes them out in the type they were made from."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: OutlineLinear) -> torch.Tensor:
        ctx.layer, ctx.biased = layer, ctx.needs_input_grad[1]
        return linear(x, layer.written_out(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        d_bias = g.flatten(0, -2).sum(0) if ctx.biased else None
        return g.matmul(ctx.layer.written_out(ctx.layer.dtype).to(g.dtype)), d_bias, None


class Outlined(WeightCodec):
    """The storage of outlines: read as a weight without contents, never written."""

    name = "outline"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, OutlineLinear)

    def read(self, layer: Any) -> torch.Tensor:
        return layer.written_out(torch.float32)  # type: ignore[no-any-return]

    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        raise MergeError("an outline has no weight that could be merged into")
