"""Points from which a run goes on as if it had not stopped: trained weights, optimizer, random states, position.

A checkpoint is written into a folder beside its place, flushed to the disk, and takes its name only when it is complete: a
run killed at any moment leaves the last good one. The last few and the best are kept. Each holds the best weights so far
too, so that a run can go on from any of them: remove the later ones. The base model is frozen and not written.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from afina.core.files import read_weights, write_weights
from afina.errors import CheckpointError, TrainingError

__all__ = ["chosen", "forget_after", "latest", "load", "random_states", "save", "set_random_states"]

_PREFIX = "step-"


Weights = Mapping[str, torch.Tensor]


def save(
    folder: Path,
    step: int,
    weights: Weights,
    best: Weights,
    state: Mapping[str, Any],
    tensors: Mapping[str, Any],
    *,
    keep: int = 1,
    best_step: int = 0,
) -> None:
    """Write the state after `step`, then remove all but the last `keep` and the one of `best_step`.

    `state` is plain values; `tensors` is what torch.save takes and loads without running code.
    Raises TrainingError where the disk does not take it; what was there stays as it was.
    """
    beside, final = folder / f".{_PREFIX}{step}", folder / f"{_PREFIX}{step}"
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed while it wrote
        beside.mkdir(parents=True)
        write_weights(beside / "weights.safetensors", weights, {})
        if best:
            _write_best(beside, weights, best)
        with (beside / "optimizer.pt").open("wb") as file:
            torch.save(dict(tensors), file)
            _flush(file)
        with (beside / "state.json").open("w", encoding="utf-8") as text:
            text.write(json.dumps({**state, "step": step}, indent=2) + "\n")
            _flush(text)
        _flush_folder(beside)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        _flush_folder(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        last = latest(folder)
        rest = f"the last good one, {last}, is as it was: make room and go on with --resume" if last else "there is none yet"
        free = f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free" if folder.is_dir() else "no folder was made"
        raise TrainingError(
            f"the checkpoint of step {step} could not be written into {folder} ({_reason(error)}; {free}); {rest}"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for older in _complete(folder)[:-keep]:
        if _step(older) != best_step:
            shutil.rmtree(older)


def _write_best(folder: Path, weights: Weights, best: Weights) -> None:
    """Beside `weights`, which they often are: then another name of the same file, where the disk knows such."""
    own, place = folder / "weights.safetensors", folder / "best.safetensors"
    if weights.keys() == best.keys() and all(torch.equal(weights[name], best[name]) for name in best):
        with suppress(OSError):
            os.link(own, place)
            return
    write_weights(place, best, {})


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(_complete(folder)), None)


def chosen(folder: Path, step: int | None) -> Path | None:
    """The checkpoint of a step, or the newest; None where there is none at all.

    Raises TrainingError, naming those that are there, where the step's is not. Removes nothing; `forget_after` does.
    """
    if step is None:
        return latest(folder)
    there = _complete(folder)
    for checkpoint in there:
        if _step(checkpoint) == step:
            return checkpoint
    steps = ", ".join(str(_step(p)) for p in there) or "none"
    raise TrainingError(f"--from-step {step}: {folder} has no checkpoint of that step; it has those of step {steps}")


def forget_after(folder: Path, step: int) -> None:
    """Remove checkpoints of later steps, which are of a way that is not gone on."""
    for checkpoint in _complete(folder):
        if _step(checkpoint) > step:
            shutil.rmtree(checkpoint)


def load(
    checkpoint: Path, live: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """Put a checkpoint into the live weights; returns its plain values, its tensors and the best weights.

    Raises CheckpointError where it belongs to another model.
    """
    weights = read_weights(checkpoint / "weights.safetensors")
    best = read_weights(checkpoint / "best.safetensors") if (checkpoint / "best.safetensors").is_file() else {}
    wrong = sorted(
        k for k in weights.keys() | live.keys() if k not in live or k not in weights or weights[k].shape != live[k].shape
    )
    if wrong:
        raise CheckpointError(f"{checkpoint} does not fit this model: {len(wrong)} weights differ, for example {wrong[0]}")
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(weights[key])
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8")), saved, best


def random_states() -> dict[str, Any]:
    """The states of every generator of this process: torch's, its device's, numpy's and Python's."""
    _, numbers, position, has_gauss, gauss = np.random.get_state(legacy=True)
    found = {
        "cpu": torch.get_rng_state(),
        "numpy": (torch.from_numpy(np.asarray(numbers).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_states(states: Mapping[str, Any]) -> None:
    """Make every generator go on from there."""
    torch.set_rng_state(states["cpu"])
    numbers, *rest = states["numpy"]
    np.random.set_state(("MT19937", numbers.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _complete(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob(f"{_PREFIX}*") if (p / "state.json").is_file()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _reason(error: Exception) -> str:
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """So that names are on the disk as well; where the system opens no folders, it is left to it."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
