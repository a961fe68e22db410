"""Training rows with what a frozen reference makes of them, computed once, before the first step.

They are computed in the order of their lengths, so that a run that goes on has the same numbers; they lie beside its
checkpoints, so that it need not even compute them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from afina.core.files import write_atomically
from afina.tasks.task import Feature, Rows, Task
from afina.training.batching import sorted_batches
from afina.training.engines.engine import Engine

__all__ = ["referred"]

_FILE = "reference.json"


class Referred(Sequence[Feature]):
    """Features, each with what its reference is."""

    def __init__(self, features: Sequence[Feature], answers: Sequence[Any]):
        self.features, self.answers = features, answers

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {**self.features[index], "reference": self.answers[index]}


def referred(
    model: Any, task: Task, rows: Rows, batch_size: int, engine: Engine, folder: Path, *, known: bool
) -> Rows:  # fmt: skip
    """The rows with their references: those that lie in `folder` where they are `known` already, else computed and kept
    there."""
    about = hashlib.sha256(engine.precision.encode())
    for feature in rows.features:
        about.update(json.dumps(feature, sort_keys=True).encode())
    path, same = folder / _FILE, about.hexdigest()
    with suppress(OSError, ValueError, KeyError):
        kept = json.loads(path.read_text(encoding="utf-8")) if known else {"same": ""}
        if kept["same"] == same:
            return Rows(rows.examples, Referred(rows.features, kept["answers"]))
    engine.wait()
    answers = _computed(model, task, rows, batch_size, engine)
    if engine.main:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"same": same, "answers": answers})
        with suppress(OSError):  # they can be computed again
            write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return Rows(rows.examples, Referred(rows.features, answers))


@torch.no_grad()
def _computed(model: Any, task: Task, rows: Rows, batch_size: int, engine: Engine) -> list[Any]:
    """What the reference makes of each row; processes share the work, unless each must take part in every pass."""
    model.eval()
    batches = sorted_batches(rows.lengths, batch_size)
    own = batches if engine.sharded else batches[engine.process :: engine.processes]

    def asked(model: Any, batch: Any) -> list[Any]:
        with engine.autocast():
            return task.reference_answers(model, batch)

    made: dict[int, Any] = {}
    for chosen in own:
        batch = {k: v.to(engine.device) for k, v in task.collate([rows.features[i] for i in chosen]).items()}
        made |= zip(chosen, engine.read(model, asked, batch), strict=True)
    for others in engine.gather(made):
        made |= others
    return [made[i] for i in range(len(rows.features))]
