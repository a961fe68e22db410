"""A linear layer and a low-rank product beside it, y = x W.T + b + s (x A.T) B.T, as one node of the graph.

Left to autograd this is a chain of small nodes whose bookkeeping costs more than their sums on small layers, and whose
temporaries are as large as the output on big ones. Here both products go into one buffer, forward and backward, and the
input's gradient is summed in place. Kept for backward: x, x A.T, and one byte a value of x under dropout. Under autocast
x is cast once for layers that read it one after the other, as query, key and value do, and the copy is kept, not x; so are
those of A and B. The weight's, which autograd would keep, is made again in backward, but for small weights and few rows,
where that would take as long as the product. What has the type already is used as it is.

Thin products are laid so that the long side is the last one: on a CPU that is two to three times faster than the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import linear

from afina.core.lora_dropout import DROPOUT, is_seed, kernels

__all__ = ["LowRank", "fused_dtype", "low_rank_linear", "would_cast"]

_FEW = 256  # rows
_FEW_VALUES = 2048  # of an activation, for which a call costs more than its arithmetic
_SMALL = 1 << 20  # values of a weight

Optional = torch.Tensor | None

# the input that was cast last, its version, the id of the factor of the layer that read it first, and the copy
_last: tuple[ref[torch.Tensor], int, int, torch.Tensor] | None = None


class LowRank(NamedTuple):
    """A layer and what is beside it: weight `[out, in]`, which is frozen, and bias `[out]`, which may be trained, down
    `[r, in]`, up `[out, r]` and shift `[out]`, a trained summand of the bias. `scale` multiplies up and shift; p is the
    probability of dropout on the input of `down`."""

    weight: torch.Tensor
    bias: Optional
    down: torch.Tensor
    up: torch.Tensor
    shift: Optional = None
    scale: float = 1.0
    p: float = 0.0


def fused_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype | None:
    """The type to compute in, where the node may be used: the one of x and weight, or autocast's. None under what looks
    into the graph (compiler, functorch, derivatives forward)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    device = "cpu" if x.is_cpu or x.is_meta else x.device.type
    if not torch.is_autocast_enabled(device):
        return x.dtype if x.dtype == weight.dtype else None
    dtype = torch.get_autocast_dtype(device)
    known = (dtype, torch.float32)
    return dtype if x.dtype in known and weight.dtype in known else None


def would_cast(factor: torch.Tensor) -> bool:
    """Whether autocast, where backward runs within it, would compute in another type than forward did, that of `factor`."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = factor.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is not factor.dtype


def low_rank_linear(x: torch.Tensor, layer: LowRank, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The output `[..., out]` for x `[..., in]`, computed in `dtype`, or that of x."""
    dtype = x.dtype if dtype is None else dtype
    if not torch.is_grad_enabled():
        return _compute(_in_type(x, dtype), *layer)[0]
    weight, bias, down, up, shift, scale, p = layer
    return _apply(_shared(x, dtype, down), weight, bias, _in_type(down, dtype), _in_type(up, dtype), shift, scale, p)


def _compute(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional, down: torch.Tensor, up: torch.Tensor, shift: Optional,
    scale: float, p: float,
) -> tuple[torch.Tensor, torch.Tensor, Optional, float]:  # fmt: skip
    """The output, x A.T, which values of x dropout kept, and the scale with dropout's factor in it."""
    dtype = x.dtype
    rows, kept = _flat(x), None
    seen, strength, down = rows, scale, _in_type(down, dtype)
    if p > 0.0:
        kept, factor = DROPOUT.kept(rows, len(down), p)
        strength = scale * factor
        if not is_seed(kept):
            number = _number(kept, dtype)
            seen = number.mul_(rows) if number.dtype is dtype else rows * number
    z = kernels().product(rows, down, kept, p) if is_seed(kept) else seen.mm(down.t())
    y = linear(x, _in_type(weight, dtype), _whole_bias(bias, shift, scale, dtype))
    _flat(y).addmm_(z, _in_type(up, dtype).t(), alpha=strength)
    return y, z, kept, strength


class _LowRankLinear(torch.autograd.Function):
    """x, down and up have the type of the arithmetic."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *layer: Any) -> torch.Tensor:
        own, bias, down, up, shift, ctx.scale, ctx.p = layer
        weight = _in_type(own, x.dtype)
        y, z, kept, ctx.strength = _compute(x, weight, *layer[1:])
        into_x, _, _, into_down, into_up, *_ = ctx.needs_input_grad
        ctx.of_bias, ctx.of_shift = None if bias is None else bias.dtype, None if shift is None else shift.dtype
        ctx.turned = False
        if weight is own or len(z) > _FEW or own.numel() > _SMALL:
            weight, ctx.turned = _known_to_engines(own)
        ctx.save_for_backward(x if into_down or into_up else None, weight if into_x else None, down, up, z, kept)
        # no view of another tensor: a model may write into what its layer returns, as wav2vec2 does where padding is
        return y.data

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Optional, ...]:
        saved = ctx.saved_tensors
        if would_cast(saved[2]):
            with torch.autocast(g.device.type, enabled=False):
                return _gradients(ctx, saved, g)
        return _gradients(ctx, saved, g)


def _gradients(ctx: Any, saved: tuple[Any, ...], g: torch.Tensor) -> tuple[Optional, ...]:
    x, weight, down, up, z, kept = saved
    into_x, _, into_bias, into_down, into_up, into_shift, *_ = ctx.needs_input_grad
    dtype, strength = z.dtype, ctx.strength
    rows = _flat(g)
    drawn = is_seed(kept)
    if drawn and torch.is_grad_enabled():  # for a second derivative the mask must be there
        kept, drawn = kernels().keep_mask(kept, len(rows), down.shape[1], ctx.p), False
    mask = None if kept is None or drawn else _number(kept, dtype)
    seen: Any = None if x is None else _flat(x)
    if mask is not None and x is not None:
        seen = seen * mask
    d_x = d_down = d_up = d_shift = None
    if into_up:
        if torch.is_grad_enabled():  # for a second derivative z must be part of the graph
            z = seen.mm(down.t())
        if rows.numel() <= _FEW_VALUES:  # laid as the parameter is, or its gradient would be copied into that form
            d_up = _scaled_product(rows.t(), z, up, strength)
        else:
            d_up = _scaled_product(z.t(), rows, up.t(), strength).t()
    d_z = _scaled_product(rows, up, z, strength)
    if into_down:
        d_down = kernels().product_gradient(d_z, seen, kept, ctx.p) if drawn else d_z.t().mm(seen)
    if into_x:
        weight = _in_type(weight, dtype)
        d_x = rows.mm(weight.t() if ctx.turned else weight)
        if drawn:
            kernels().add_product(d_x, d_z, down, kept, ctx.p)
        else:
            d_x = d_x.addmm_(d_z, down) if mask is None else d_x.addcmul_(d_z.mm(down), mask)
        d_x = d_x if g.dim() == 2 else d_x.view(*g.shape[:-1], d_x.shape[1])
    if into_shift:
        d_shift = rows.sum(0, dtype=ctx.of_shift) * ctx.scale
    d_bias = rows.sum(0, dtype=ctx.of_bias) if into_bias else None
    return d_x, None, d_bias, d_down, d_up, d_shift, None, None


# Function.apply less its search for functorch, which `fused_dtype` has done
_apply: Callable[..., torch.Tensor] = super(torch.autograd.Function, _LowRankLinear).apply  # type: ignore[misc]


def _flat(x: torch.Tensor) -> torch.Tensor:
    """`[..., n]` as `[rows, n]`."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _in_type(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a type; without a call where it has that type."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _shared(x: torch.Tensor, dtype: torch.dtype, reader: torch.Tensor) -> torch.Tensor:
    """x in a type; one copy for layers that read the same x one after the other, and one sum of their gradients. Where the
    first of them, known by a factor of its own, reads again, a pass begins: x may hold other values, written past its
    version by way of `.data` or numpy."""
    global _last
    if x.dtype is dtype:
        return x
    if (x.is_leaf and x.requires_grad) or x.is_inference():  # its copy would hold it; it has no version
        return x.to(dtype)
    last = _last
    if last is not None and last[0]() is x and last[1] == x._version and last[2] != id(reader):
        made = last[3]
        if made.dtype is dtype and made.requires_grad is x.requires_grad:
            return made
    made = x.to(dtype)
    _last = ref(x, _forget), x._version, id(reader), made
    return made


def _forget(gone: ref[torch.Tensor]) -> None:
    global _last
    if _last is not None and _last[0] is gone:
        _last = None


def _scaled_product(a: torch.Tensor, b: torch.Tensor, like: torch.Tensor, scale: float) -> torch.Tensor:
    """scale a b, of the shape of `like`, in one call."""
    return torch.addmm(like, a, b, beta=0, alpha=scale)


def _whole_bias(bias: Optional, shift: Optional, scale: float, dtype: torch.dtype) -> Optional:
    """The layer's bias and the trained one beside it."""
    if shift is not None:
        shift = shift * scale
        bias = shift if bias is None else bias + shift
    return None if bias is None else _in_type(bias, dtype)


def _known_to_engines(weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """What to keep of a weight, and whether that is its transpose: engines that free a parameter between forward and
    backward know it, and not its view."""
    turned = isinstance(weight._base, nn.Parameter)
    return (weight._base, True) if turned else (weight, False)  # type: ignore[return-value]


def _number(kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 where it is true, else 0: of that type, or of one byte where there are few."""
    number = kept.view(torch.uint8)  # much faster than from bool
    return number if number.numel() <= _FEW_VALUES else number.to(dtype)
