"""Which runs can be trained in one pass, and how many at once: found by what they are, then by trying.

Runs that cannot share a pass still share base, rows and trunk; they are trained one after another, and the reason is told
(T35). A joined pass is tried with real rows first: it must give each run the loss that the run has by itself, and take less
time than the runs one by one; how many adapters fit is foretold from the memory that one and two take.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from afina.core.adapter import SavedModule
from afina.core.registry import method_for
from afina.errors import AfinaError
from afina.memory.measure import available, is_out_of_memory, measured, release
from afina.sweep.joined import Asked, JoinedModel
from afina.training import checkpoints
from afina.training.engines.ddp import DDP
from afina.training.fast_path import engine_dtype
from afina.training.packing import wants_packing
from afina.training.running import Run

__all__ = ["alike", "alone_because", "tried"]

_HEADROOM = 0.1  # of the memory, left free
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}  # of a loss, relative
_GAIN = 0.95  # of the time of the runs by themselves, that a joined pass may take
_TIMED = 3  # runs of that pass; what few of them gain more of them gain, too


def alone_because(run: Run) -> str | None:
    """Why a run cannot be one of several in a pass; None where nothing is against it."""
    recipe, model = run.recipe, run.model
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or recipe.distributed.engine != "ddp":
        return f"distributed.engine={recipe.distributed.engine} divides its model or its rows among processes"
    if run.precision == "fp16":
        return "fp16 scales the gradients of each run by itself"
    if method_for(model.peft_config["default"]).kind == "prompt":
        return "virtual tokens make its rows longer than those of the others"
    if run.task.tokenizer is None or run.task.unit == "samples":
        return "its rows are not made of tokens"
    if run.task.writes_rows:
        return "what it learns from is written by its own model in every step"
    if wants_packing(model, run.task, recipe.training):
        return "its rows are packed into one"
    if run.task.parts_share:
        return "the loss of a row depends on the other rows of its step"
    if recipe.memory.limit or recipe.memory.activation_offload or recipe.training.gradient_accumulation == "auto":
        return "its memory is planned or measured for one run"
    if recipe.data.new_tokens or any("embedding" in note and "row" in note for note in run.notes):
        return "its vocabulary was enlarged"
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return "a batch norm mixes the rows of a batch"
    whole = {id(p) for m in model.modules() if isinstance(m, SavedModule) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    if all(id(p) in whole for p in trained) or sum(id(p) in whole for p in trained) > len(trained) / 2:
        return "what it trains are copies of whole modules, which share no product with those of others"
    return None


def alike(run: Run) -> str:
    """Equal for runs whose rows may go through one base: the same weights, frozen up to one block, in one arithmetic."""
    options, memory = run.recipe.training, run.recipe.memory
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    blocks = [int(found[1]) for name in trained if (found := re.search(r"\.(\d+)\.", name))]
    return repr((
        run.source, run.task.name, run.task.options, run.task.labels, memory.weights, memory.gradient_checkpointing,
        run.precision, min(blocks, default=-1), options.frozen_dropout, options.trunk_cache,
        run.model.peft_config["default"].peft_type,
    ))  # fmt: skip


def tried(runs: Mapping[str, Run], joined: JoinedModel, together: int | None) -> int | str:
    """How many of the runs go into one pass, or why none do. `together`: what was asked for, which is not measured.

    Nothing is left behind: no gradient, no drawn random number.
    """
    first = next(iter(runs.values()))
    engine = DDP(first.precision)
    chance = checkpoints.random_states()
    for run in runs.values():
        engine.place(run.model)
    try:
        found = _equal(runs, joined, engine)
        if found is not None:
            return found
        if together is not None:
            return min(together, len(runs))
        return _measured(runs, joined, engine)
    except (AfinaError, NotImplementedError) as error:
        return str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        return "two of them at once take more memory than there is"
    finally:
        for run in runs.values():
            run.model.zero_grad(set_to_none=True)
        checkpoints.set_random_states(chance)
        release(engine.device)


def _asked(runs: Mapping[str, Run], engine: Any, size: int, *, longest: bool = False) -> dict[str, Asked]:
    """The loss of each run, with rows of its own."""
    made = {}
    for name, run in runs.items():
        rows = run.rows["train"]
        order = sorted(range(len(rows.features)), key=lambda i: rows.lengths[i])
        chosen = order[-size:] if longest else order[len(order) // 2 :][:size]
        batch = {k: v.to(engine.device) for k, v in run.task.collate([rows.features[i] for i in chosen]).items()}
        made[name] = Asked(run.model, run.task.loss_sum, batch)
    return made


def _equal(runs: Mapping[str, Run], joined: JoinedModel, engine: Any) -> str | None:
    """What is wrong with the losses of a joined pass; None where nothing is."""
    asked = {}
    for i, (name, one) in enumerate(_asked(runs, engine, 3).items()):
        one.batch = {k: v[: 1 + i % 3] for k, v in one.batch.items()} if i else one.batch
        asked[name] = one
    for model in (joined.model, *(run.model for run in runs.values())):
        model.eval()
    with torch.no_grad(), engine.autocast():
        alone = [one.ask(one.model, one.batch) for one in asked.values()]
        found = joined.losses(asked)
    bound = _CLOSE[engine_dtype(engine)]
    for name, a, b in zip(runs, alone, found, strict=True):
        if not abs(float(a) - float(b)) <= bound * max(1.0, abs(float(a))):
            return f"in one pass {name} had the loss {float(b):.6g} for {float(a):.6g} by itself"
    return None


def _measured(runs: Mapping[str, Run], joined: JoinedModel, engine: Any) -> int | str:
    """How many fit, and whether a pass of them is faster than one after another."""

    def learn(asked: Mapping[str, Asked]) -> None:
        with engine.autocast():
            losses = joined.losses(asked)
        torch.autograd.backward(losses)

    def by_itself(one: Asked) -> None:
        with engine.autocast():
            loss = one.ask(one.model, one.batch)
        loss.backward()  # type: ignore[no-untyped-call]

    for model in (joined.model, *(run.model for run in runs.values())):
        model.train()
    first = next(iter(runs.values()))
    size = first.recipe.training.at_once(max(first.rows["train"].lengths), 1)
    longest = list(_asked(runs, engine, size, longest=True).items())
    peaks = []
    budget = available(engine.device) * (1 - _HEADROOM)
    for count in (1, 2):
        with measured(engine.device) as peak:
            learn(dict(longest[:count]))
        peaks.append(peak.added)
    slope = max(1, peaks[1] - peaks[0])
    most = min(len(runs), max(1, int((budget - peaks[0]) // slope) + 1))
    if most < 2:
        return "two of them at once take more memory than there is"
    few = min(most, _TIMED)
    some = dict(list(_asked(runs, engine, size).items())[:few])
    one = next(iter(some.values()))
    alone = _seconds(lambda: by_itself(one), engine) * few
    together = _seconds(lambda: learn(some), engine)
    if together > _GAIN * alone:
        return f"measured: a step of {few} runs in one pass takes {together / alone:.2f} of the time of {few} passes"
    return most


def _seconds(work: Callable[[], None], engine: Any) -> float:
    """The faster of two, after one that is not counted; of the processor where that is what computes."""
    clock = time.process_time if engine.device.type == "cpu" else time.perf_counter
    taken = []
    for _ in range(3):
        started = clock()
        work()
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        taken.append(clock() - started)
    return min(taken[1:])
