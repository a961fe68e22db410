"""`gradient_accumulation: auto`: in how many parts a step is computed, found by computing it with the longest rows.

The rows of a step stay what they are; only how many of them are computed at once follows from the memory there is. Reading
the evaluation rows is measured on its own, so that it never makes the steps of training smaller (T34). Nothing is left
behind: no gradient, no drawn random number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from afina.errors import TrainingError
from afina.memory.measure import Peak, available, is_out_of_memory, measured, release
from afina.memory.ready import ready_bytes
from afina.memory.sizes import parse_size, shown_size
from afina.memory.storage import FLOATS
from afina.report.words import counted
from afina.tasks.task import Rows, Task
from afina.training import checkpoints
from afina.training.engines.engine import Engine
from afina.training.recipe import Recipe

__all__ = ["largest_size", "settle_parts"]

_HEADROOM = 0.1  # of the memory, left free: rows differ, and so does what an allocator wastes
_OPTIMIZER = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "sgd": 4, "adafactor": 1}  # bytes a weight


def settle_parts(model: Any, task: Task, rows: Mapping[str, Rows], recipe: Recipe, engine: Engine) -> list[str]:
    """Put the fewest parts that fit, and the rows read at once, into `recipe.training`; returns what was found, to be told.

    The limit is `recipe.memory.limit`, or what is free; a tenth of it stays free.
    """
    options, device = recipe.training, engine.device
    longest = max(rows["train"].lengths)
    most = options.at_once(longest, engine.processes)
    trained = [p for p in model.parameters() if p.requires_grad]
    later = sum(p.numel() for p in trained) * _OPTIMIZER[options.optimizer]  # not there yet while this is measured
    if not (recipe.memory.tight or recipe.memory.activation_offload or engine.sharded):
        later += ready_bytes(model, FLOATS[engine.precision])
    release(device)
    limit = parse_size(recipe.memory.limit) if recipe.memory.limit else _in_use(device) + available(device)
    budget = int(limit * (1 - _HEADROOM)) - later

    def learn(features: list[Any]) -> None:
        model.train()
        batch = {k: v.to(device) for k, v in task.collate(features).items()}
        with engine.autocast():
            if task.parts_share:
                task.share(model, [batch], lambda value: [value], 0)
            loss = task.loss_sum(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def read(features: list[Any]) -> None:
        model.eval()
        batch = {k: v.to(device) for k, v in task.collate(features).items()}
        with engine.autocast():
            task.answers(model, batch)

    def tried(work: Callable[[list[Any]], None], side: Rows) -> Callable[[int], None]:
        order = sorted(range(len(side.features)), key=lambda i: -side.lengths[i])

        def run(size: int) -> None:
            try:
                work([side.features[order[i % len(order)]] for i in range(size)])
            finally:
                model.zero_grad(set_to_none=True)

        return run

    chance = checkpoints.random_states()
    size, peak = largest_size(tried(learn, rows["train"]), most, device, budget)
    if peak > budget:
        raise TrainingError(
            f"one row alone takes {shown_size(peak + later)}, and {shown_size(limit)} less a tenth is what there is; "
            "`afina plan` says what makes it less: checkpointing, an 8-bit optimizer, weights in int8 or nf4"
        )
    if options.evaluation_batch_size is None:
        asked = options.read_at_once
        options.evaluation_batch_size, _ = largest_size(tried(read, rows["validation"]), asked, device, budget)
    checkpoints.set_random_states(chance)
    if engine.processes > 1:
        size = min(engine.gather(size))
        options.evaluation_batch_size = min(engine.gather(options.evaluation_batch_size))
    options.gradient_accumulation = options.parts_for(size, longest, engine.processes)
    return [
        f"measured with the longest rows: {size} of the {options.at_once(longest, 1)} rows of a step fit at once "
        f"({shown_size(peak)} of {shown_size(limit)}), so a step is computed in "
        f"{counted(options.gradient_accumulation, 'part')}; evaluation reads "
        f"{options.evaluation_batch_size} rows at once"
    ]


def largest_size(run: Callable[[int], None], most: int, device: torch.device, budget: int) -> tuple[int, int]:
    """The largest of 1, 2, 4, ... and `most` that `run` can be called with below `budget` bytes, and the peak it had there.

    Each size is foretold from the two before it, so that what would not fit is not even tried; 1 is always tried, and its
    error is raised where even that runs out of memory.
    """
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    fits, peaks = 1, dict[int, int]()
    for size in sizes:
        if size > 2:
            one, two = sorted(peaks)[-2:]
            slope = max(0.0, (peaks[two] - peaks[one]) / (two - one))
            if peaks[two] + slope * (size - two) > budget:
                break
        peak = Peak()
        try:
            with measured(device) as peak:
                run(size)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            break
        peaks[size] = peak.most
        if peak.most > budget:
            break
        fits = size
    release(device)
    return fits, peaks[fits]


def _in_use(device: torch.device) -> int:
    with measured(device) as now:
        pass
    return now.before
