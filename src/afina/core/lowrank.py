"""A linear layer and a low-rank product beside it, y = x W.T + b + s (x A.T) B.T, as one node of the graph.

Left to autograd this is a chain of small nodes whose bookkeeping costs more than their sums on small layers, and whose
temporaries are as large as the output on big ones. Here both products go into one buffer, forward and backward, and the
input's gradient is summed in place. Kept for backward: x, x A.T, and one byte a value of x under dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from afina.core.dropout import keep_mask

__all__ = ["can_fuse", "low_rank_linear"]

Optional = torch.Tensor | None


def can_fuse(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the node may be used: one dtype, no autocast, and nothing that looks into the graph (compiler, functorch)."""
    return (
        x.dtype == weight.dtype
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu" if x.is_cpu or x.is_meta else x.device.type)
        and not torch._C._are_functorch_transforms_active()
    )


def low_rank_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional, down: torch.Tensor, up: torch.Tensor, scale: float, p: float = 0.0
) -> torch.Tensor:
    """The output `[..., out]` for x `[..., in]`: weight `[out, in]` and bias `[out]`, both frozen, down `[r, in]`, up
    `[out, r]`, all of one dtype; p is the probability of dropout on the input of `down`."""
    if torch.is_grad_enabled():
        return _apply(x, weight, bias, down, up, scale, p)
    return _compute(x, weight, bias, down, up, scale, p)[0]


def _compute(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional, down: torch.Tensor, up: torch.Tensor, scale: float, p: float
) -> tuple[torch.Tensor, torch.Tensor, Optional, float]:
    """The output, x A.T, which values of x dropout kept, and the scale with dropout's factor in it."""
    rows, kept = _rows(x), None
    seen = rows
    if p > 0.0:
        kept, factor = keep_mask(rows, p)
        seen, scale = _number(kept, x).mul_(rows), scale * factor
    z = seen.mm(down.t())
    y = linear(x, weight, bias)
    (y if x.dim() == 2 else y.view(-1, y.shape[-1])).addmm_(z, up.t(), alpha=scale)
    return y, z, kept, scale


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        y, z, kept, ctx.scale = _compute(x, *args)
        weight, _, down, up, _, _ = args
        into_x, _, _, into_down, into_up, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if into_down or into_up else None, weight if into_x else None, down, up, z, kept)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Optional, ...]:
        x, weight, down, up, z, kept = ctx.saved_tensors
        into_x, _, _, into_down, into_up, _, _ = ctx.needs_input_grad
        g_rows = _rows(g)
        mask = None if kept is None else _number(kept, g)
        seen: Any = None if x is None else _rows(x) if mask is None else _rows(x) * mask
        d_x = d_down = d_up = None
        if into_up:
            if torch.is_grad_enabled():  # for a second derivative z must be part of the graph
                z = seen.mm(down.t())
            d_up = torch.addmm(up, g_rows.t(), z, beta=0, alpha=ctx.scale)  # beta=0: a product scaled in the same call
        d_z = torch.addmm(z, g_rows, up, beta=0, alpha=ctx.scale)
        if into_down:
            d_down = d_z.t().mm(seen)
        if into_x:
            d_x = g_rows.mm(weight)
            d_x = d_x.addmm_(d_z, down) if mask is None else d_x.addcmul_(d_z.mm(down), mask)
            d_x = d_x if g.dim() == 2 else d_x.view(*g.shape[:-1], -1)
        return d_x, None, None, d_down, d_up, None, None


# Function.apply less its search for functorch, which `can_fuse` has done
_apply: Callable[..., torch.Tensor] = super(torch.autograd.Function, _LowRankLinear).apply  # type: ignore[misc]


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _number(kept: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return kept.view(torch.uint8).to(like.dtype)  # much faster than from bool
