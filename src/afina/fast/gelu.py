"""GELU's tanh form on a CPU in bfloat16, by the matrix units' own activation.

torch's kernel takes five times as long as that of the form with erf, and longer than the product before it. oneDNN can apply
the same formula to what a matrix product gives, on the way out: here the product is one with the identity, which gives back
what went in, in a third of the time. Of the 65,024 normal numbers of bfloat16 all but five come out as from torch, bit by
bit; those five differ in the last, and what torch makes zero far out may be as much as 2e-7. Backward is torch's own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from afina.fast.stand_in import StandIn

__all__ = ["quick_gelu"]

_SIDE = 32  # of the identity: the least with which a product is at its fastest
_SMALLEST = 1 << 14  # values; fewer are not worth the way

_STAND_IN = StandIn(F, "gelu")


def quick_gelu() -> AbstractContextManager[None]:
    """Inside the block `torch.nn.functional.gelu`, which `nn.GELU` calls, is as the module says."""
    return _STAND_IN.by(_gelu)


def _gelu(input: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    if approximate != "tanh" or not _suits(input):
        return _STAND_IN.given(input, approximate=approximate)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and input.requires_grad:
        return _TanhGelu.apply(input)  # type: ignore[no-any-return, no-untyped-call]
    return _value(input)


def _suits(x: torch.Tensor) -> bool:
    if type(x) is not torch.Tensor or not x.is_cpu or x.dtype != torch.bfloat16 or not x.is_contiguous():
        return False
    if x.numel() < _SMALLEST or x.numel() % _SIDE or not _works():
        return False
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


@cache
def _works() -> bool:
    """Whether oneDNN is there and multiplies bfloat16 on this processor; it does not without AVX-512."""
    try:
        _value(torch.zeros(1, _SIDE, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError):
        return False
    return True


@cache
def _identity() -> torch.Tensor:
    return torch.eye(_SIDE, dtype=torch.bfloat16)


def _value(x: torch.Tensor) -> torch.Tensor:
    rows = torch.ops.aten.view.default(x, [-1, _SIDE])
    made = torch.ops.mkldnn._linear_pointwise(rows, _identity(), None, "gelu", [], "tanh")
    return torch.ops.aten.view.default(made, list(x.shape))  # type: ignore[no-any-return]


class _TanhGelu(torch.autograd.Function):
    """What is kept is the input, as torch does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _value(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward.default(gradient, x, approximate="tanh")  # type: ignore[no-any-return]
