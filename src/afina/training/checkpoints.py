"""Points from which a run goes on as if it had not stopped: trained weights, optimizer, schedule, random state, position.

Written after every epoch into a folder of its own, which takes its name only when it is complete; the last one is kept.
The base model is frozen and not written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from afina.core.files import read_weights, write_weights
from afina.errors import CheckpointError

__all__ = ["latest", "load", "save"]

_PREFIX = "epoch-"


Weights = Mapping[str, torch.Tensor]


def save(
    folder: Path, epoch: int, weights: Weights, best: Weights, state: Mapping[str, Any], optimizer: Any, scheduler: Any
) -> None:
    """Write the state after `epoch` and remove older ones."""
    beside = folder / f".{_PREFIX}{epoch}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write_weights(beside / "weights.safetensors", weights, {})
        write_weights(beside / "best.safetensors", best, {})
        chance = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            chance["cuda"] = torch.cuda.get_rng_state()
        saved = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "chance": chance}
        torch.save(saved, beside / "optimizer.pt")
        (beside / "state.json").write_text(json.dumps({**state, "epoch": epoch}, indent=2) + "\n", encoding="utf-8")
        final = folder / f"{_PREFIX}{epoch}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for older in folder.glob(f"{_PREFIX}*"):
        if older.name != f"{_PREFIX}{epoch}":
            shutil.rmtree(older)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if (p / "state.json").is_file()]
    return max(found, key=lambda p: int(p.name.removeprefix(_PREFIX)), default=None)


def load(
    checkpoint: Path, live: Mapping[str, torch.Tensor], optimizer: Any, scheduler: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Put a checkpoint into the live weights, optimizer and schedule; returns its state and the best weights.

    Raises CheckpointError where it belongs to another model.
    """
    weights, best = read_weights(checkpoint / "weights.safetensors"), read_weights(checkpoint / "best.safetensors")
    wrong = sorted(
        k for k in weights.keys() | live.keys() if k not in live or k not in weights or weights[k].shape != live[k].shape
    )
    if wrong:
        raise CheckpointError(f"{checkpoint} does not fit this model: {len(wrong)} weights differ, for example {wrong[0]}")
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(weights[key])
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["chance"]["cpu"])
    if "cuda" in saved["chance"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["chance"]["cuda"])
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8")), best
