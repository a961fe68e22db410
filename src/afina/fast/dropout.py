"""The dropout of a model's own layers drawn as afina draws its own (`core/dropout.py`), on a CPU.

torch's takes a sixth of a step of a small encoder there. Inside `quick_dropout` other numbers are drawn, at the same rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from afina.core.dropout import drop

__all__ = ["quick_dropout"]

_given = F.dropout
_inside = 0  # blocks entered; runs of a sweep leave theirs in any order


@contextmanager
def quick_dropout() -> Iterator[None]:
    """Inside the block `torch.nn.functional.dropout`, which `nn.Dropout` calls, is as the module says."""
    global _inside
    _inside += 1
    F.dropout = _dropout
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            F.dropout = _given


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training:
        return input
    if inplace or not 0.0 <= p < 1.0 or not input.is_cpu or torch.compiler.is_compiling():
        return _given(input, p, training, inplace)
    return drop(input, p, training)
