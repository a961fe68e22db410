"""Activation functions as one operation instead of the formula that it stands for.

Several models write GELU's tanh form out, which keeps five tensors of the feed-forward's width for backward where torch's
own keeps one, and computes the same number up to rounding.
"""

from __future__ import annotations

from torch import nn

__all__ = ["use_fused_activations"]

_TANH_GELU = ("NewGELUActivation", "FastGELUActivation", "BloomGelu", "AccurateGELUActivation", "GELUTanh")


def use_fused_activations(model: nn.Module) -> int:
    """Put torch's own in the place of written-out ones of transformers; returns how many there were."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ in _TANH_GELU and type(child).__module__.startswith("transformers.")
    ]
    for parent, name in found:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    return len(found)
