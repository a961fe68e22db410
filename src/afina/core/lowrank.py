"""A linear layer and a low-rank product beside it, y = x W.T + b + s (x A.T) B.T, as one node of the graph.

Left to autograd this is a chain of small nodes whose bookkeeping costs more than their sums on small layers, and whose
temporaries are as large as the output on big ones. Here both products go into one buffer, forward and backward, and the
input's gradient is summed in place. Kept for backward: x, x A.T, and one byte a value of x under dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from afina.core.dropout import keep_mask

__all__ = ["can_fuse", "low_rank_linear"]

Optional = torch.Tensor | None


def can_fuse(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the node may be used: one dtype, no autocast, and nothing that looks into the graph (compiler, functorch)."""
    return (
        x.dtype == weight.dtype
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
    )


def low_rank_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional, down: torch.Tensor, up: torch.Tensor, scale: float, p: float = 0.0
) -> torch.Tensor:
    """x `[..., in]`, weight `[out, in]` and bias `[out]` (both frozen), down `[r, in]`, up `[out, r]`, one dtype; p is
    the probability of dropout on the input of `down`. Returns `[..., out]`."""
    if torch.is_grad_enabled():
        return _LowRankLinear.apply(x, weight, bias, down, up, scale, p)  # type: ignore[no-any-return]
    rows = _rows(x)
    seen = rows
    if p > 0.0:
        kept, factor = keep_mask(rows, p)
        seen, scale = _masked(rows, kept), scale * factor
    y = F.linear(rows, weight, bias).addmm_(seen.mm(down.t()), up.t(), alpha=scale)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)


def _masked(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return kept.view(torch.uint8).to(x.dtype).mul_(x)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Optional, down: torch.Tensor, up: torch.Tensor, scale: float,
        p: float,
    ) -> torch.Tensor:  # fmt: skip
        rows = _rows(x)
        kept, seen = None, rows
        if p > 0.0:
            kept, factor = keep_mask(rows, p)
            seen, scale = _masked(rows, kept), scale * factor
        z = seen.mm(down.t())
        y = F.linear(rows, weight, bias).addmm_(z, up.t(), alpha=scale)
        into_x, _, _, into_down, into_up, _, _ = ctx.needs_input_grad
        ctx.scale = scale
        ctx.save_for_backward(
            x if into_down or into_up else None,
            weight if into_x else None,
            down,
            up,
            z,
            kept if into_x or into_down else None,
        )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Optional, ...]:
        x, weight, down, up, z, kept = ctx.saved_tensors
        into_x, _, _, into_down, into_up, _, _ = ctx.needs_input_grad
        g_rows = _rows(g)
        mask = None if kept is None else kept.view(torch.uint8).to(g.dtype)
        seen = x if x is None else _rows(x) if mask is None else _rows(x) * mask
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


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
