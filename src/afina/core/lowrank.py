"""A linear layer and a low-rank product beside it, y = x W.T + b + s (x A.T) B.T, as one node of the graph.

Left to autograd this is a chain of small nodes whose bookkeeping costs more than their sums on small layers, and whose
temporaries are as large as the output on big ones. Here both products go into one buffer, forward and backward, and the
input's gradient is summed in place. Kept for backward: x, x A.T, and one byte a value of x under dropout. Under autocast
the 16-bit copy of the weight, which autograd would keep, is made again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from afina.core.dropout import keep_mask

__all__ = ["fused_dtype", "low_rank_linear"]

Optional = torch.Tensor | None


def fused_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype | None:
    """The type to compute in, where the node may be used: the one of x and weight, or autocast's. None under what looks
    into the graph (compiler, functorch)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    device = "cpu" if x.is_cpu or x.is_meta else x.device.type
    if not torch.is_autocast_enabled(device):
        return x.dtype if x.dtype == weight.dtype else None
    dtype = torch.get_autocast_dtype(device)
    known = (dtype, torch.float32)
    return dtype if x.dtype in known and weight.dtype in known else None


def low_rank_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional, down: torch.Tensor, up: torch.Tensor, scale: float,
    p: float = 0.0, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """The output `[..., out]` for x `[..., in]`: weight `[out, in]` and bias `[out]`, both frozen, down `[r, in]`, up
    `[out, r]`; p is the probability of dropout on the input of `down`; computed in `dtype`, or that of x."""
    dtype = x.dtype if dtype is None else dtype
    if torch.is_grad_enabled():
        return _apply(x, weight, bias, down, up, scale, p, dtype)
    return _compute(x, weight, bias, down, up, scale, p, dtype)[0]


def _compute(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional, down: torch.Tensor, up: torch.Tensor, scale: float, p: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, Optional, float]:  # fmt: skip
    """The output, x A.T, which values of x dropout kept, and the scale with dropout's factor in it."""
    x, weight, down, up = x.to(dtype), weight.to(dtype), down.to(dtype), up.to(dtype)
    rows, kept = _rows(x), None
    seen = rows
    if p > 0.0:
        kept, factor = keep_mask(rows, p)
        seen, scale = _number(kept, x).mul_(rows), scale * factor
    z = seen.mm(down.t())
    y = linear(x, weight, None if bias is None else bias.to(dtype))
    (y if x.dim() == 2 else y.view(-1, y.shape[-1])).addmm_(z, up.t(), alpha=scale)
    return y, z, kept, scale


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        y, z, kept, ctx.scale = _compute(x, *args)
        weight, _, down, up, _, _, ctx.dtype = args
        into_x, _, _, into_down, into_up, *_ = ctx.needs_input_grad
        ctx.of_x, ctx.turned = x.dtype, isinstance(weight._base, nn.Parameter)
        weight = weight._base if ctx.turned else weight  # engines that free a parameter in between know it, and not its view
        ctx.save_for_backward(x if into_down or into_up else None, weight if into_x else None, down, up, z, kept)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Optional, ...]:
        x, weight, down, up, z, kept = ctx.saved_tensors
        into_x, _, _, into_down, into_up, *_ = ctx.needs_input_grad
        dtype, masters, g = ctx.dtype, (down.dtype, up.dtype), g.to(ctx.dtype)
        down, up = down.to(dtype), up.to(dtype)
        g_rows = _rows(g)
        mask = None if kept is None else _number(kept, g)
        seen: Any = None if x is None else _rows(x.to(dtype)) if mask is None else _rows(x.to(dtype)) * mask
        d_x = d_down = d_up = None
        if into_up:
            if torch.is_grad_enabled():  # for a second derivative z must be part of the graph
                z = seen.mm(down.t())
            d_up = torch.addmm(up, g_rows.t(), z, beta=0, alpha=ctx.scale)  # beta=0: a product scaled in the same call
        d_z = torch.addmm(z, g_rows, up, beta=0, alpha=ctx.scale)
        if into_down:
            d_down = d_z.t().mm(seen)
        if into_x:
            weight = weight.to(dtype)
            d_x = g_rows.mm(weight.t() if ctx.turned else weight)
            d_x = d_x.addmm_(d_z, down) if mask is None else d_x.addcmul_(d_z.mm(down), mask)
            d_x = (d_x if g.dim() == 2 else d_x.view(*g.shape[:-1], -1)).to(ctx.of_x)
        d_down = None if d_down is None else d_down.to(masters[0])
        d_up = None if d_up is None else d_up.to(masters[1])
        return d_x, None, None, d_down, d_up, None, None, None


# Function.apply less its search for functorch, which `fused_dtype` has done
_apply: Callable[..., torch.Tensor] = super(torch.autograd.Function, _LowRankLinear).apply  # type: ignore[misc]


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _number(kept: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return kept.view(torch.uint8).to(like.dtype)  # much faster than from bool
