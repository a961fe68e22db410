"""Attention of short rows on a CPU in bfloat16: plain matrix products, where torch's kernel is slow in its backward.

`scaled_dot_product_attention` takes a fused kernel there, whose backward does not use the CPU's matrix units: for rows of 17
tokens it takes eight times as long as the five products it stands for, for rows of 128 three times. With dropout it computes
in float32 and draws 64 bits for each score. Inside `short_attention` it gives way to one autograd node that keeps the
weights in bfloat16 and goes back by batched products, wherever a gradient is asked for and the weights, `[queries, keys]`,
are no more than queries, keys, values and outcome; with dropout always, where torch keeps several times as much. Rows and
heads are gone through in pieces whose weights stay in the processor's cache.

What comes out is attention computed in bfloat16, as it is elsewhere: products are summed in float32 and rounded once, the
softmax is computed in float32; over few keys its scores are widened first, since torch's softmax of bfloat16 takes five
times as long there, and backward ten times. Dropout draws other numbers than torch would, at the same rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from afina.core.dropout import keep_mask
from afina.fast.stand_in import StandIn

__all__ = ["Count", "short_attention"]

_AT_ONCE = 1 << 19  # weights; a megabyte
_FEW = 64  # keys up to which the softmax is given float32
_WIDTHS = 4  # keys as a multiple of a head's width, up to which weights take no more room than what goes in and comes out


@dataclass
class Count:
    """Calls with a gradient: in how many of `asked` the products were used."""

    asked: int = 0
    used: int = 0

    def said(self) -> str:
        """What computed attention, as a sentence (T35)."""
        if not self.used:
            return f"attention was torch's kernel in all {self.asked} passes: plain products are for short rows alone"
        share = f"in {self.used} of {self.asked} passes through an attention"
        return f"{share} plain products stood in for torch's kernel, which is slower in bf16 on a CPU"


_STAND_IN = StandIn(F, "scaled_dot_product_attention")
_counts: list[Count] = []  # of the blocks that are entered


@contextmanager
def short_attention() -> Iterator[Count]:
    """Inside the block `torch.nn.functional.scaled_dot_product_attention` is as the module says."""
    _counts.append(count := Count())
    try:
        with _STAND_IN.by(_attention):
            yield count
    finally:
        _counts[:] = [other for other in _counts if other is not count]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    options: dict[str, Any] = {
        "attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa
    }  # fmt: skip
    if has_torch_function((query, key, value, attn_mask)):
        return handle_torch_function(_attention, (query, key, value, attn_mask), query, key, value, **options)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled() or not (query.requires_grad or key.requires_grad or value.requires_grad):
        return _STAND_IN.given(query, key, value, **options)  # type: ignore[no-any-return]
    q, k, v = (_in_arithmetic(t) for t in (query, key, value))
    suits = _suits(q, k, v, attn_mask, dropout_p)
    for count in _counts:
        count.asked += 1
        count.used += suits
    if not suits:
        return _STAND_IN.given(query, key, value, **options)  # type: ignore[no-any-return]
    if enable_gqa and q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Products.apply(q, k, v, attn_mask, dropout_p, is_causal, factor)  # type: ignore[no-any-return, no-untyped-call]


def _in_arithmetic(x: torch.Tensor) -> torch.Tensor:
    """As autocast hands a tensor to torch's own attention."""
    if x.is_cpu and x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


def _suits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float) -> bool:
    if not (q.is_cpu and q.dim() == 4 and q.dtype == k.dtype == v.dtype == torch.bfloat16):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not 0.0 < dropout < 1.0 and (dropout or k.shape[2] > _WIDTHS * q.shape[-1]):
        return False
    return mask is None or (not mask.requires_grad and _sees_something(mask))


def _sees_something(mask: torch.Tensor) -> bool:
    """Whether each query sees a key: where one sees none torch gives zeros. A mask without contents is taken to."""
    if type(mask) is not torch.Tensor or mask.is_meta:
        return True
    if mask.dtype == torch.bool:
        return bool(mask.any(-1).all())
    return bool(mask.min() > -torch.inf) or bool((mask.amax(-1) > -torch.inf).all())


class _Products(torch.autograd.Function):
    """`q [rows, heads, queries, width]`, `k` and `v` with keys for queries."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float,
        causal: bool, factor: float,
    ) -> torch.Tensor:  # fmt: skip
        rows, heads = q.shape[:2]
        q, k, v = (t.reshape(rows * heads, *t.shape[2:]) for t in (q, k, v))
        form, wide = (q.shape[1], k.shape[1]), _of_softmax(k)
        weights = q.new_empty(rows * heads, *form)
        kept = torch.empty(weights.shape, dtype=torch.bool, device=q.device) if dropout else None
        out = q.new_empty(rows * heads, q.shape[1], v.shape[2])
        beside, lift = _summands(mask, causal, form, wide, q.device), 1.0
        first, after = (q * factor, 1.0) if math.frexp(factor)[0] == 0.5 else (q, factor)  # a power of two rounds nothing
        for row, head, at in _stretches(rows, heads, form):
            scores = torch.bmm(first[at], k[at].transpose(1, 2)).to(wide)
            if after != 1.0:
                scores.mul_(after)
            for summand in beside:
                scores.view(-1, len(range(*head.indices(heads))), *form).add_(_part(summand, row, head))
            here = weights[at]
            if wide == here.dtype:
                torch._softmax(scores, -1, False, out=here)
            else:
                here.copy_(torch._softmax(scores, -1, False))
            if kept is not None:
                kept[at], lift = keep_mask(here, dropout)
                here = here * _number(kept[at], q.dtype)
            torch.bmm(here, v[at], out=out[at])
        ctx.factor, ctx.lift = factor, lift
        ctx.save_for_backward(q, k, v, weights, kept)
        return _scaled(out, lift).view(rows, heads, *out.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights, kept = ctx.saved_tensors
        rows, heads = g.shape[:2]
        g = g.reshape(rows * heads, *g.shape[2:])
        into_q, into_k, into_v = (torch.empty_like(t) for t in (q, k, v))
        wide = _of_softmax(k)
        for _, _, at in _stretches(rows, heads, weights.shape[1:]):
            here, into_weights = weights[at], torch.bmm(g[at], v[at].transpose(1, 2))
            dropped = here
            if kept is not None:
                number = _number(kept[at], q.dtype)
                dropped, into_weights = here * number, into_weights.mul_(number)
            torch.bmm(dropped.transpose(1, 2), g[at], out=into_v[at])
            into_scores = torch._softmax_backward_data(into_weights.to(wide), here.to(wide), -1, wide).to(q.dtype)
            torch.bmm(into_scores, k[at], out=into_q[at])
            torch.bmm(into_scores.transpose(1, 2), q[at], out=into_k[at])
        scales = ctx.factor * ctx.lift, ctx.factor * ctx.lift, ctx.lift  # of the small tensors: the others are all linear
        made = [_scaled(t, scale) for t, scale in zip((into_q, into_k, into_v), scales, strict=True)]
        return *(t.view(rows, heads, *t.shape[1:]) for t in made), None, None, None, None


def _stretches(rows: int, heads: int, form: Sequence[int]) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, heads, and rows by heads whose weights are computed at once: few enough to stay in a processor's cache, all of
    one shape, as each new one costs time. `form`: queries and keys."""
    fit = max(1, _AT_ONCE // (form[0] * form[1]))
    if fit >= heads:
        step = _divisor(rows, fit // heads)
        for row in range(0, rows, step):
            yield slice(row, row + step), slice(0, heads), slice(row * heads, (row + step) * heads)
    else:
        step = _divisor(heads, fit)
        for row in range(rows):
            for head in range(0, heads, step):
                at = row * heads + head
                yield slice(row, row + 1), slice(head, head + step), slice(at, at + step)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is not larger than `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _summands(
    mask: torch.Tensor | None, causal: bool, form: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """What is added to the scores, `[rows or 1, heads or 1, queries or 1, keys or 1]`."""

    def hidden(where: torch.Tensor) -> torch.Tensor:
        return torch.zeros(where.shape, dtype=dtype, device=device).masked_fill_(where, -torch.inf)

    made = []
    if causal:
        made.append(hidden(torch.ones(form, dtype=torch.bool, device=device).triu_(1)))
    if mask is not None:
        made.append(hidden(~mask) if mask.dtype == torch.bool else mask)
    return [m.view((1,) * (4 - m.dim()) + m.shape) for m in made]


def _part(summand: torch.Tensor, row: slice, head: slice) -> torch.Tensor:
    """Of these rows and heads."""
    return summand[row if summand.shape[0] > 1 else slice(None), head if summand.shape[1] > 1 else slice(None)]


def _of_softmax(k: torch.Tensor) -> torch.dtype:
    return torch.float32 if k.dtype == torch.bfloat16 and k.shape[1] <= _FEW else k.dtype


def _number(kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 where it is true, else 0."""
    return kept.view(torch.uint8).to(dtype)  # much faster than from bool


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1.0 else x.mul_(scale)
