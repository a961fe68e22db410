"""Everything that keeps a training step small, in one call: what backward keeps, checkpointed blocks, offload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from afina.core.report import passes
from afina.memory.activations import use_fused_activations
from afina.memory.checkpointing import checkpoint_blocks
from afina.memory.keeping import keep_less
from afina.memory.offload import activation_mover
from afina.methods.lora import LoRA

__all__ = ["lean_step", "slower_layers"]


def lean_step(
    model: Any,
    device: torch.device,
    *,
    gradient_checkpointing: bool = False,
    activation_offload: bool = False,
    roomy: bool = False,
    spell: Callable[[str], str] = str,
) -> list[str]:
    """Make the training steps of an adapted model take little memory; results stay as they are, to rounding.

    Returns what is to be known of it, as sentences for a person: which layers are computed in a slower way (T35).

    `roomy`: time counts for more than memory: what backward could compute again is kept. Blocks are checkpointed and
    activations moved all the same.
    Raises ConfigError, naming options as `spell` says they were typed, for what this model or device does not do.
    """
    mover = activation_mover(device, spell("memory.activation_offload")) if activation_offload else None
    if gradient_checkpointing:
        checkpoint_blocks(model, spell("memory.gradient_checkpointing"))
    use_fused_activations(model)
    if mover is not None or gradient_checkpointing or not roomy:
        keep_less(model, mover, in_blocks=gradient_checkpointing)
    return slower_layers(model)


def slower_layers(model: Any) -> list[str]:
    """The LoRA layers that cannot be computed as one operation with their layer, and why."""
    adapters, reasons, count = model.adapters, Counter[str](), 0
    for key, reason in passes(adapters).items():
        layer = adapters.layers[key]
        if layer.view.kind == "linear" and any(type(adapter) is LoRA for adapter in layer.adapters.values()):
            count += 1
            reasons.update([reason] if reason else [])
    said = "; ".join(f"{number}: {reason}" for reason, number in reasons.items())
    slow = sum(reasons.values())
    return [f"{slow} of {count} LoRA layers take the slower path, not fused with their layer ({said})"] if slow else []
