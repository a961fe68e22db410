"""What a policy is measured against, out of the same weights: its base, with the adapter switched off.

A run that starts from an adapter keeps that adapter, frozen, under the name `reference`, so that the policy begins at its
reference and not beside it (T31). Either way there is one copy of the base in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from afina.core.runtime import State

__all__ = ["REFERENCE", "has_reference", "reference", "without_dropout"]

REFERENCE = "reference"  # the adapter that a run started from


@contextmanager
def reference(model: Any) -> Iterator[None]:
    """The reference inside the block, without gradients; with every adapter switched off before, it is the base."""
    adapters = _inner(model).adapters
    there = REFERENCE in adapters.configs and adapters.runtime.state.enabled
    state = State((REFERENCE,)) if there else State(adapters.active, enabled=False)
    with torch.no_grad(), adapters.runtime.using(state):
        yield


def has_reference(model: Any) -> bool:
    """Whether there is one: a model into which the adapter was merged has none."""
    return getattr(_inner(model), "adapters", None) is not None


def _inner(model: Any) -> Any:
    while (inner := getattr(model, "module", None)) is not None:
        model = inner
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """Nothing in the model is drawn by chance any more: of a base, so that a policy differs from its reference by what it
    learned alone; of the adapter that is the reference, so that it always says the same."""
    for module in model.modules():
        for name, value in list(vars(module).items()):  # `p` is torch's name for it, and that of afina's adapters
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
    return model
