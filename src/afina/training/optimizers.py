"""What moves the weights, and how fast over the run: `make_optimizer`, `schedule_factor`.

The learning rate follows from the step alone, so a resumed run needs no state for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from afina.errors import ConfigError, MissingDependencyError

__all__ = ["OPTIMIZERS", "SCHEDULES", "make_optimizer", "schedule_factor"]

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "lion_8bit": "Lion8bit"}
OPTIMIZERS = ("adamw", *_BITSANDBYTES, "sgd", "adafactor")
SCHEDULES = ("linear", "cosine", "constant")


def make_optimizer(name: str, trained: Mapping[str, torch.Tensor], rate: float, decay: float) -> torch.optim.Optimizer:
    """An optimizer over the trained parameters; matrices decay, vectors do not.

    Raises MissingDependencyError where it comes from bitsandbytes, which is not installed, and ConfigError for a paged one
    on a CPU.
    """
    matrices = [p for p in trained.values() if p.dim() >= 2]
    vectors = [p for p in trained.values() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if name.startswith("paged") and any(p.device.type == "cpu" for p in trained.values()):
        raise ConfigError(f"optimizer={name}: on a CPU nothing can be paged out; use {name.removeprefix('paged_')}")
    if name in _BITSANDBYTES:
        try:
            import bitsandbytes.optim as made
        except ImportError as error:
            raise MissingDependencyError("bitsandbytes", "bitsandbytes", f"optimizer {name}") from error
        return getattr(made, _BITSANDBYTES[name])(groups, lr=rate)  # type: ignore[no-any-return]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=rate, relative_step=False, scale_parameter=False)
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") and p.is_floating_point() for p in trained.values())
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), fused=fused)


def schedule_factor(name: str, steps: int, warmup: float, step: int) -> float:
    """Factor of the learning rate at `step`, which counts from 0.

    Up over the first share `warmup` of the steps; then as it is, or down to almost nothing at the last: on a line, or on
    half a cosine.
    """
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    if name == "constant":
        return 1.0
    left = max(0.0, (steps - step) / max(1, steps - rising + 1))
    return left if name == "linear" else (1.0 - math.cos(math.pi * left)) / 2
