"""The last block computed at the one position of a row that is read of it, and nowhere else.

A classifier reads the last block at its first or its last token alone. Keys and values are needed of all tokens; queries,
what follows on the attention, and the whole feed-forward part are needed of one. Within the block's own forward two things
are changed for that: the attention is asked for the queries of that position, and a sum of what comes out of it with
something that still has all positions takes that position of it. From there on the block works on `[rows, 1, width]`; its
result goes back into a tensor of all positions, zero elsewhere.

Which position is read is found by asking for the gradient, and that the outcome is the same is tried before anything
relies on it: an architecture that does something else keeps its own way, and the reason is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["narrowed", "position_read"]

_SUMS = {
    torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__,
}  # fmt: skip
_SHAPES = {torch.reshape, torch.Tensor.reshape, torch.Tensor.view}


class _Narrow(TorchFunctionMode):
    """What a block's forward calls, with one query a row."""

    def __init__(self, places: torch.Tensor):
        super().__init__()
        self.places, self.rows = places, torch.arange(len(places), device=places.device)
        self.length = 0  # queries there would have been; 0 before the attention

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.length and func in _SUMS:
            args = self._summands(*args)
        if self.length and func in _SHAPES:
            args = self._shape(*args)
        return func(*args, **kwargs)

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        self.length = query.shape[2]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(len(query), -1, self.length, -1)[self.rows, :, self.places].unsqueeze(2)
        elif is_causal:
            attn_mask = (torch.arange(key.shape[2], device=key.device) <= self.places[:, None])[:, None, None]
        one = query[self.rows, :, self.places].unsqueeze(2)
        return F.scaled_dot_product_attention(one, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **kwargs)

    def _summands(self, a: Any, b: Any, *others: Any) -> tuple[Any, ...]:
        full = [self.length, 1]
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dim() == b.dim() == 3 and len(a) == len(b):
            if [a.shape[1], b.shape[1]] == full:
                a = a[self.rows, self.places].unsqueeze(1)
            elif [b.shape[1], a.shape[1]] == full:
                b = b[self.rows, self.places].unsqueeze(1)
        return a, b, *others

    def _shape(self, x: torch.Tensor, *shape: Any) -> tuple[Any, ...]:
        """A shape that counts on all positions counts on one."""
        if len(shape) == 1 and not isinstance(shape[0], int):
            if isinstance(shape[0], torch.dtype):
                return x, *shape
            shape = tuple(shape[0])
        sizes = list(shape)
        if -1 not in sizes and math.prod(sizes) == x.numel():
            return x, sizes  # counted on what is there: an adapter's own shape may have a size that is the row's by chance
        if sizes[0] == -1 and sizes[1:] == list(x.shape[1 - len(sizes) :]):
            return x, sizes  # what is before is put together, and the rest stays as it is
        for place in range(1, len(sizes)):
            if sizes[place] == self.length and 1 in x.shape[1:]:
                sizes[place] = 1
                break
        return x, sizes


@contextmanager
def narrowed(owner: nn.Module, block: nn.Module, position: str) -> Iterator[None]:
    """Inside it, `block` of `owner`, which is given attention_mask, is computed at the "first" or "last" token of a row."""
    masks: list[torch.Tensor | None] = [None]

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks[0] = kwargs.get("attention_mask")

    forward = block.forward

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows, length = hidden.shape[:2]
        if length == 1:
            return forward(hidden, *args, **kwargs)
        places = _places(masks[0], position, rows, length, hidden.device)
        with _Narrow(places) as mode:
            out = forward(hidden, *args, **kwargs)
        made = out[0] if isinstance(out, tuple) else out
        if made.shape[1] != 1:
            raise NotImplementedError(f"{type(block).__name__} gave {made.shape[1]} positions for one")
        whole = made.new_zeros(rows, length, made.shape[2]).index_put((mode.rows, places), made[:, 0])
        return (whole, *out[1:]) if isinstance(out, tuple) else whole

    hook = owner.register_forward_pre_hook(begins, with_kwargs=True)
    block.forward = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        hook.remove()
        del block.forward
        if forward.__name__ != "forward" or getattr(forward, "__self__", None) is not block:
            block.forward = forward  # type: ignore[method-assign]  # it was somebody else's already


def _places(mask: torch.Tensor | None, position: str, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """The first or last token that is no padding, `[rows]`; virtual tokens in front have been put before the mask."""
    if mask is None or mask.shape != (rows, length):
        return torch.full((rows,), 0 if position == "first" else length - 1, device=device)
    order = torch.arange(length, device=device)
    if position == "last":
        return torch.where(mask.bool(), order, -1).amax(1).clamp(min=0)
    return torch.where(mask.bool(), order, length).amin(1).clamp(max=length - 1)


def position_read(block: nn.Module, mask: torch.Tensor, call: Callable[[], torch.Tensor]) -> str | None:
    """Says "first" or "last" where `call`, a scalar of a batch with this mask, depends on that position of the block's
    output alone; None where it does not. Rows of `mask` `[rows, tokens]` must differ in length for this to be told."""
    outputs: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, out: Any) -> Any:
        made = (out[0] if isinstance(out, tuple) else out).detach().requires_grad_()
        outputs.append(made)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    hook = block.register_forward_hook(note)
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(call(), outputs[-1:] or [torch.zeros(0)], allow_unused=True)
    finally:
        hook.remove()
    if gradient is None or len(outputs) != 1 or gradient.shape[:2] != mask.shape:
        return None
    read = gradient.abs().amax(2) > 0
    for position in ("first", "last"):
        places = _places(mask, position, len(mask), mask.shape[1], mask.device)
        only = torch.zeros_like(read)
        only[torch.arange(len(mask)), places] = True
        if bool((read == only).all()):
            return position
    return None
