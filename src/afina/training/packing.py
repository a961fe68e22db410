"""`packing`: whether the rows of a step are packed or padded, and why.

Rows of like length meet in a batch anyway, so that packing can save no more than the little padding that is left, and a mask
of blocks costs something for every pair of tokens of different rows (benchmarks/packing.py measures both). Kernels for rows
of any length need no such mask: where the attention has them, and nowhere else, `auto` packs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afina.errors import ConfigError
from afina.fast.packing import sees_others
from afina.tasks.task import Rows, Task
from afina.training import checkpoints
from afina.training.engines.engine import Engine
from afina.training.recipe import TrainingOptions

__all__ = ["settle_packing", "wants_packing"]

_TRIED = 3  # rows
_CLOSE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # of logits, relative to the largest


def wants_packing(model: Any, task: Task, options: TrainingOptions) -> bool:
    """Whether rows are packed where the model turns out to keep them apart."""
    if options.packing != "auto":
        return options.packing == "on"
    config = model.get_base_model().config
    virtual = any(getattr(c, "num_virtual_tokens", None) for c in model.peft_config.values())
    return task.packs and not virtual and "flash" in str(getattr(config, "_attn_implementation", ""))


def settle_packing(model: Any, task: Task, rows: Mapping[str, Rows], options: TrainingOptions, engine: Engine) -> list[str]:
    """Let the task pack its rows where that is wanted and exact; returns what was found, to be told.

    Raises ConfigError where `training.packing=on` cannot be done.
    """
    task.packed = False
    if not wants_packing(model, task, options):
        return []
    why = f"{engine.name} keeps the model in shards, whose processes must call it equally often" if engine.sharded else None
    why = why or _tried(model, task, rows["train"], engine)
    if why is None:
        task.packed = True
        return ["rows are packed without padding; tried with real rows, none sees another"]
    if options.packing == "on":
        raise ConfigError(f"training.packing=on: rows cannot be packed here ({why}); leave it out")
    return [f"rows are padded, not packed ({why})"]


def _tried(model: Any, task: Task, train: Rows, engine: Engine) -> str | None:
    """Why rows of this model may not be packed."""
    order = sorted(range(len(train.features)), key=lambda i: train.lengths[i])
    chosen = [train.features[i] for i in order[: max(2, len(order) // 2)][-_TRIED:]]
    if len(chosen) < 2:
        return "there is but one row"
    chance = checkpoints.random_states()
    model.eval()
    with engine.autocast():
        batch = {k: v.to(engine.device) for k, v in task.collate(chosen).items()}
        why = sees_others(model, batch, _CLOSE[engine.precision])
    checkpoints.set_random_states(chance)
    return why and f"{type(model.get_base_model()).__name__}: {why}"
