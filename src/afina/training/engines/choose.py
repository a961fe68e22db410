"""Which engine a run gets, and whether it can do what the recipe asks: `make_engine`, `check_engine`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from afina.errors import MissingDependencyError, Problems
from afina.memory.storage import FLOATS
from afina.training.engines.ddp import DDP
from afina.training.engines.deepspeed import Zero2, Zero3
from afina.training.engines.engine import Engine
from afina.training.engines.fsdp2 import FSDP2

__all__ = ["ENGINES", "check_engine", "make_engine"]

_NOT_ZERO3 = ("p_tuning",)
ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (DDP, FSDP2, Zero2, Zero3)}


def make_engine(precision: str, name: str = "ddp", *, offload: bool = False) -> Engine:
    """The engine of a run, on the devices there are. Raises MissingDependencyError where a library is missing."""
    return ENGINES[name](precision, offload=offload)


def check_engine(recipe: Any, precision: str, problems: Problems, spell: Callable[[str], str] = str) -> None:
    """Add what the chosen engine cannot do of what the recipe asks, and that there are too few devices for all processes."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if devices and here > devices:
        many = f"{devices} device{'s' * (devices > 1)}"
        problems.add(f"--processes {here}: this machine has {many}, and each process needs one; take at most {devices}")
    engine = ENGINES.get(recipe.distributed.engine)
    if engine is None:
        return  # the recipe's own check has told it
    asked = f"{spell('distributed.engine')}={engine.name}"
    if issubclass(engine, Zero2) and importlib.util.find_spec("deepspeed") is None:
        problems.add(str(MissingDependencyError("deepspeed", "deepspeed", asked)))
    if issubclass(engine, Zero3) and recipe.method.get("name") in _NOT_ZERO3:
        problems.add(
            f"{spell('method.name')}={recipe.method['name']} with {asked}: DeepSpeed takes the network behind the "
            "prompt away while it is saved; take engine fsdp2 or zero2"
        )
    options = recipe.training
    if engine.optimizers is not None and options.optimizer not in engine.optimizers:
        problems.add(
            f"{spell('training.optimizer')}={options.optimizer} cannot be divided among processes as {asked} does; take "
            f"{' or '.join(engine.optimizers)}, or engine ddp"
        )
    if engine is not DDP and precision == "fp16":
        problems.add(f"{spell('training.precision')}=fp16 with {asked}: take bf16 or fp32, or engine ddp")
    if engine.sharded and recipe.memory.weights not in (*FLOATS, "auto"):
        problems.add(
            f"{spell('memory.weights')}={recipe.memory.weights} cannot be cut into shards as {asked} does; take engine ddp "
            "or zero2, which keep the quantised weights whole in each process, or weights bf16"
        )
    if engine.sharded and int(os.environ.get("WORLD_SIZE", "1")) > 1 and options.gradient_accumulation == "auto":
        problems.add(
            f"{spell('training.gradient_accumulation')}=auto is measured with a whole model, which {asked} does not have; "
            "give a number of parts"
        )
