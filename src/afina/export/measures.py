"""What an artefact with rounded weights costs: size, speed, and the task's own figures on the validation rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from afina.data.example import Example
from afina.export.golden import ask_rows
from afina.tasks.task import Feature, Figure, Task

__all__ = ["Speed", "alternated", "drop", "figures_of", "with_references"]

_BATCH = 16  # rows read at once where speed is measured
_BATCHES, _ROUNDS = 4, 7


def figures_of(model: Any, task: Task, examples: Sequence[Example], features: Sequence[Feature]) -> dict[str, Any]:
    """The figures of the task that are shown, of labelled rows."""
    made = task.metrics(ask_rows(model, task, examples, features), examples)
    return {key: made[key] for key in task.figures if made.get(key) is not None}


@torch.no_grad()
def with_references(model: Any, task: Task, features: Sequence[Feature]) -> list[Feature]:
    """The features of a policy with what its reference makes of them, so that figures can be made without one."""
    made: list[Feature] = []
    for start in range(0, len(features), _BATCH):
        some = features[start : start + _BATCH]
        answers = task.reference_answers(model, task.collate(some))
        made += [{**f, "reference": answer} for f, answer in zip(some, answers, strict=True)]
    return made


def drop(figure: Figure, before: float, after: float) -> float:
    """How much worse a figure has become: in points where more is better (0.01 is one point of accuracy), else as a share
    of what it was. Negative where it has become better."""
    if figure.better > 0:
        return before - after
    return (after - before) / max(abs(before), 1e-9)


@dataclass
class Speed:
    """Rows a second, medians of alternating rounds, of the merged model and of the artefact. `cpu` is the ratio of processor
    time, which other work on the machine disturbs less."""

    before: float
    after: float
    cpu: float
    threads: int

    @property
    def ratio(self) -> float:
        """How many times as fast the artefact is."""
        return self.after / self.before


@torch.no_grad()
def alternated(before: Any, after: Any, task: Task, features: Sequence[Feature], rounds: int = _ROUNDS) -> Speed:
    """Time two models in turn on the same batches, in an order that is reversed every round."""
    step = max(1, len(features) // (_BATCH * _BATCHES))
    some = [{**f, "row": 0} for f in features[::step][: _BATCH * _BATCHES]]
    batches = [task.collate(some[i : i + _BATCH]) for i in range(0, len(some), _BATCH)]
    spent: dict[str, list[float]] = {"before": [], "after": []}
    worked: dict[str, list[float]] = {"before": [], "after": []}
    models = [("before", before), ("after", after)]
    for number in range(-1, rounds):  # the first round warms up
        for name, model in models if number % 2 else reversed(models):
            start, work = time.perf_counter(), time.process_time()
            for batch in batches:
                task.outputs(model, batch)
            if number >= 0:
                spent[name].append(time.perf_counter() - start)
                worked[name].append(time.process_time() - work)
    before_s, after_s = (statistics.median(spent[name]) for name in ("before", "after"))
    cpu = statistics.median(worked["before"]) / statistics.median(worked["after"])
    return Speed(len(some) / before_s, len(some) / after_s, cpu, torch.get_num_threads())
