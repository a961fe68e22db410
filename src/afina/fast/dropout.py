"""The dropout of a model's own layers drawn as afina draws its own (`core/dropout.py`), on a CPU.

torch's takes a sixth of a step of a small encoder there. Inside `quick_dropout` other numbers are drawn, at the same rate.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from afina.core.dropout import drop
from afina.fast.stand_in import StandIn

__all__ = ["quick_dropout"]

_STAND_IN = StandIn(F, "dropout")


def quick_dropout() -> AbstractContextManager[None]:
    """Inside the block `torch.nn.functional.dropout`, which `nn.Dropout` calls, is as the module says."""
    return _STAND_IN.by(_dropout)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training:
        return input
    if inplace or not 0.0 <= p < 1.0 or not input.is_cpu or torch.compiler.is_compiling():
        return _STAND_IN.given(input, p, training, inplace)  # type: ignore[no-any-return]
    return drop(input, p, training)
