"""One forward pass for the rows of several requests, each with its own adapter and its own task.

A task asks a model for what its head says of a batch. Here that has been computed already, for everyone's rows at once, and
the task is given a stand-in for the model which hands out its rows of the result. So a task knows nothing of the others, and
what it makes of the result (temperatures, thresholds, spans, vectors) is what it makes of it anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from afina.core.runtime import BASE_ROW
from afina.serving.models import Lane, Served
from afina.tasks.task import Batch, Feature

__all__ = ["forward", "read_together"]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "bbox")
_ONE_A_ROW = "SEQ_CLS"  # results are [rows, classes]; those of other kinds are [rows, tokens, ...]


@dataclass
class _Computed:
    """Stands in for a model that has been asked: `[rows, ...]` of the results, cut to the tokens of the batch."""

    results: dict[str, torch.Tensor]
    batch: Batch

    def __call__(self, **inputs: Any) -> Any:
        if other := set(inputs) - set(_INPUTS):
            raise TypeError(f"the task hands {', '.join(sorted(other))} to the model, which was computed without")
        if inputs["input_ids"].shape != self.batch["input_ids"].shape:
            raise TypeError("the task hands other rows to the model than those of its batch")
        return _Result(self.results)


class _Result:
    def __init__(self, results: dict[str, torch.Tensor]):
        self.__dict__.update(results)


def read_together(lane: Lane, asked: Sequence[tuple[Served, Sequence[Feature]]]) -> list[list[Any]]:
    """One list of answers, a feature each, for everyone who asks; all of one lane."""
    with torch.no_grad():
        batches = [served.task.collate(features) for served, features in asked]
        pads = [served.task.tokenizer.pad_token_id for served, _ in asked]
        names = [s.adapter for (s, _), batch in zip(asked, batches, strict=True) for _ in range(len(batch["input_ids"]))]
        inputs = _joined(batches, pads)
        results = forward(lane, names, inputs)
        answers, start, widest = list[list[Any]](), 0, inputs["input_ids"].shape[1]
        for (served, _), batch in zip(asked, batches, strict=True):
            rows, width = batch["input_ids"].shape
            own = {name: value[start : start + rows] for name, value in results.items()}
            if served.task.task_type == _ONE_A_ROW:
                own = {name: value[:, : _classes(served)] for name, value in own.items()}
            else:
                own = {name: _of_tokens(value, widest - width, _classes(served)) for name, value in own.items()}
            moved = {name: value.to(lane.device) for name, value in batch.items()}
            answers.append(served.task.answers(_Computed(own, batch), moved))
            start += rows
        return answers


def forward(lane: Lane, names: Sequence[str], inputs: Batch) -> dict[str, torch.Tensor]:
    """What the model says, by name, `[rows, ...]`; each row with its adapter."""
    inputs = {name: value.to(lane.device) for name, value in inputs.items()}
    with lane.adapters.runtime.using(lane.state(names)), lane.storage.arithmetic(lane.device):
        found = lane.model.get_base_model()(**inputs)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _joined(batches: Sequence[Batch], pads: Sequence[int]) -> Batch:
    """The inputs of all batches as one, padded on the right; segments are 0 where a task gives none, as the model has it."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    joined = {}
    for name in (name for name in _INPUTS if any(name in batch for batch in batches)):
        parts = [
            _padded(batch.get(name, torch.zeros_like(batch["input_ids"])), width, pad if name == "input_ids" else 0)
            for batch, pad in zip(batches, pads, strict=True)
        ]
        joined[name] = torch.cat(parts)
    return joined


def _padded(rows: torch.Tensor, width: int, value: int) -> torch.Tensor:
    """Rows of a number, or of the four of a box, a token."""
    return torch.nn.functional.pad(rows, (*[0] * (2 * (rows.dim() - 2)), 0, width - rows.shape[1]), value=value)


def _classes(served: Served) -> int | None:
    """Outputs of the run's own head; the results are as wide as the widest head."""
    if served.adapter == BASE_ROW:
        return None
    return len(served.task.labels) or (1 if served.task.task_type == _ONE_A_ROW else None)


def _of_tokens(value: torch.Tensor, surplus: int, classes: int | None) -> torch.Tensor:
    """Results of tokens less the `surplus` behind them, for others' longer rows; virtual tokens stand in front and stay."""
    value = value[:, : value.shape[1] - surplus]
    return value[..., :classes] if value.dim() > 2 else value
