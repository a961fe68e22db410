"""Everything that keeps a training step small, in one call: what backward keeps, checkpointed blocks, offload, the heap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from afina.memory.activations import use_fused_activations
from afina.memory.checkpointing import checkpoint_blocks
from afina.memory.heap import large_tensors_apart
from afina.memory.keeping import keep_less
from afina.memory.offload import activation_mover

__all__ = ["lean_step"]


def lean_step(
    model: Any,
    device: torch.device,
    *,
    gradient_checkpointing: bool = False,
    activation_offload: bool = False,
    spell: Callable[[str], str] = str,
) -> None:
    """Make the training steps of an adapted model take little memory; results stay as they are, to rounding.

    Raises ConfigError, naming options as `spell` says they were typed, for what this model or device does not do.
    """
    mover = activation_mover(device, spell("memory.activation_offload")) if activation_offload else None
    if gradient_checkpointing:
        checkpoint_blocks(model, spell("memory.gradient_checkpointing"))
    if device.type == "cpu":
        large_tensors_apart()
    use_fused_activations(model)
    keep_less(model, mover)
