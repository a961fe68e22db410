"""A product with a weight that is stored as int8 rows, one scale a row: W = q * s.

y = (x q.T) * s, so the scales touch activations alone. Kept for backward are `q` and `s` themselves, never a floating-point
copy: backward makes that again.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["compute_dtype", "int8_rows", "row_linear"]


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, scale)
        y = torch.mm(x.reshape(-1, x.shape[-1]), rows.t().to(x.dtype)) * scale.to(x.dtype)
        return y.reshape(*x.shape[:-1], rows.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, scale = ctx.saved_tensors
        (grad,) = grads
        flat = (grad * scale.to(grad.dtype)).reshape(-1, grad.shape[-1])
        return torch.mm(flat, rows.to(grad.dtype)).reshape(*grad.shape[:-1], rows.shape[1]), None, None


def row_linear(x: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[..., in]` with rows `[out, in]` (int8) and scale `[out]` gives `[..., out]`, in x's dtype or that of autocast."""
    x = x.to(compute_dtype(x))
    y: torch.Tensor = _RowLinear.apply(x, rows, scale)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(y.dtype)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What a product with `x` is computed in: the type of autocast where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def int8_rows(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A floating-point weight `[out, in]` as int8 rows and their scales `[out]`. A row that fits in the present `scale`
    keeps it, so that writing what was read changes nothing."""
    weight, scale = weight.float(), scale.float()
    steps = (weight / scale[:, None]).round()
    kept = (steps.amin(1) >= -128) & (steps.amax(1) <= 127) & (steps.abs().amax(1) >= 127)
    fresh = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).eps)
    chosen = torch.where(kept, scale, fresh)
    return (weight / chosen[:, None]).round().clamp(-128, 127).to(torch.int8), chosen
