"""What a run takes of memory, known before anything is loaded: `Planner`.

The model is built on the meta device from its configuration, adapted as it would be, and a step of training and a batch of
evaluation are run on it without contents (`memory.trace`), with the longest rows there are. So the plan follows what the
code does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from afina.core.codecs import counted
from afina.fast.attention import short_attention
from afina.fast.blocks import find_stack
from afina.fast.dropout import quick_dropout
from afina.functions import get_peft_model
from afina.memory.devices import allocator_of, autocast_of, backward, hidden_of, kernels_of, overhead_of
from afina.memory.footprint import Footprint, Moment, divided
from afina.memory.loading import READ_BEFORE_TIDYING
from afina.memory.measure import resident
from afina.memory.ready import ready_bytes, ready_weights
from afina.memory.sizes import parse_size, shown_size
from afina.memory.step import lean_step
from afina.memory.storage import FLOATS, Storage
from afina.memory.trace import Trace, faked
from afina.tasks.reference import REFERENCE
from afina.tasks.task import Batch, Feature, Task, length_of
from afina.training.fast_path import states_size
from afina.training.models import ModelSource, aim, load_config
from afina.training.recipe import Recipe
from afina.training.traced import NAMES, gathered_bytes, placed, planned_optimizer, vocabulary_of
from afina.training.vocabulary import fit_embeddings

__all__ = ["Planner"]


class _Enough(Exception):  # noqa: N818 (it is no error)
    """What comes after is not wanted."""


@dataclass
class Planner:
    """All that plans of one recipe share; `plan` may be asked for other settings of it."""

    task: Task
    source: ModelSource
    config: Any  # of the method
    features: Mapping[str, Sequence[Feature]]  # "train" and "evaluate", the longest first
    device: str  # cpu or cuda
    precision: str
    processes: int = 1
    notes: list[str] = field(default_factory=list)
    twice: bool = False  # the adapter that the run starts from is there a second time, as the reference
    process: int = field(default_factory=resident)  # bytes of the process without the model
    tokens: int | None = None  # of all rows that are learned from or validated on, where they are known

    @property
    def longest(self) -> int:
        """Tokens of the longest training row."""
        return length_of(self.features["train"][0])

    def plan(self, recipe: Recipe) -> Footprint:
        """The footprint of a run with these settings, of one process. `training.gradient_accumulation` may not be auto."""
        options, memory, engine = recipe.training, recipe.memory, recipe.distributed
        model, task = self.adapted(memory.weights)
        roomy = memory.roomy(self.device)
        lean_step(model, torch.device("cpu"), gradient_checkpointing=memory.gradient_checkpointing, roomy=roomy)
        assert isinstance(options.gradient_accumulation, int)
        at_once = options.at_once(self.longest, self.processes * options.gradient_accumulation)
        wide = vocabulary_of(model)
        batches = [
            task.collate(self.features[side][:count])
            for side, count in (("train", at_once), ("evaluate", options.read_at_once))
        ]
        trace = Trace(hidden=hidden_of(self.device), wide=wide)
        products = short_attention() if self.device == "cpu" and self.precision == "bf16" else nullcontext()
        drawn = quick_dropout() if self.device == "cpu" else nullcontext()
        with kernels_of(self.device), products, drawn, trace:
            trained = placed(trace, model)
            disk, known = self._trunk(trace, model, task, batches[1], recipe)
            optimizer = planned_optimizer(trace, options.optimizer, trained, options.weight_decay)
            task.label_smoothing, several = options.label_smoothing, options.gradient_accumulation > 1
            with ready_weights(model, self._ready(recipe), without=known) as copies:
                trace.follow(copies, "ready")
                self._step(trace, model, task, trained, optimizer, batches[0], several=several)
            del copies
            self._read(trace, model, task, batches[1])
        weights = {k: v for k, v in trace.peak("").parts.items() if k.startswith("weights")}
        ready = ready_bytes(model, self._ready(recipe), without=known)
        moments = {"load": self._load(weights, model, task.storage)}
        for name, phases in (("train", ("trunk", "forward", "backward", "step")), ("evaluate", ("evaluate",))):
            parts = trace.peak(*phases, allocator=allocator_of(self.device, tight=memory.tight)).parts
            if name == "evaluate" and ready:  # rows are read between steps, too
                parts["ready"] = ready
            if memory.activation_offload and self.device == "cuda" and "activations" in parts:
                kept = {"activations": parts.pop("activations")}
            else:
                kept = {}
            gathered = gathered_bytes(model, weights) if engine.engine != "ddp" else 0
            on_device, host = divided(parts, engine.engine, self.processes, offload=engine.offload, gathered=gathered)
            moments[name] = Moment(on_device, {**host, **kept})
        self._surroundings(moments)
        return Footprint(self.device, moments, list(self.notes), disk)

    def _ready(self, recipe: Recipe) -> torch.dtype:
        """The type in which frozen weights are held ready; float32: they are not."""
        memory = recipe.memory
        spare = recipe.distributed.engine == "ddp" and not (memory.tight or memory.activation_offload)
        return FLOATS[self.precision] if spare else torch.float32

    def adapted(self, weights: str) -> tuple[Any, Task]:
        """The adapted model on the meta device, its frozen weights stored as said, and a task that belongs to it."""
        task, config = copy.copy(self.task), copy.deepcopy(self.config)
        task.storage = Storage.of(weights, load_config(self.source), empty=True)
        base = task.load_model(self.source.path)
        fit_embeddings(base, task.tokenizer, config)
        aim(config, task, base)
        model = get_peft_model(base, config)
        if self.twice:
            model.add_adapter(REFERENCE, copy.deepcopy(self.config))
        task.paths(model)
        return model, task

    def _step(
        self, trace: Trace, model: Any, task: Task, trained: list[Any], optimizer: Any, rows: Batch, *, several: bool
    ) -> None:
        """One part of a step; where there are several, the gradients of the one before are there already."""
        model.train()
        if several:
            for p in trained:
                p.grad = torch.zeros_like(p)
            trace.follow((p.grad for p in trained), "gradients")
        batch = {k: faked(trace, v) for k, v in rows.items()}
        with trace.phase("forward"), autocast_of(self.precision):
            if task.parts_share:
                task.share(model, [batch], lambda value: [value], 0)
            loss = task.loss_sum(model, batch) / task.targets_in(rows)
        with trace.phase("backward"):
            backward(loss)
        del loss, batch
        trace.follow((p.grad for p in trained), "gradients")
        with trace.phase("step"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if optimizer is not None:
                optimizer.step()
        for p in trained:
            p.grad = None

    def _trunk(self, trace: Trace, model: Any, task: Task, rows: Batch, recipe: Recipe) -> tuple[str, list[nn.Module]]:
        """Pass as many rows as are read at once over the blocks that a run computes once a row (`fast_path`), without
        gradients; says what of that lies on the disk, and gives the blocks that are not computed in steps."""
        options, lists = recipe.training, [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        frozen = any(not any(p.requires_grad for p in blocks[0].parameters()) for blocks in lists)
        if not frozen or options.frozen_dropout == "keep" or recipe.distributed.engine in ("fsdp2", "zero3"):
            return "", []
        if task.writes_rows or task.varies:
            return "", []
        batch = {k: faked(trace, v) for k, v in rows.items()}
        model.eval()

        def call() -> None:
            with autocast_of(self.precision):
                task.loss_sum(model, batch)

        stack = find_stack(model, call)
        if isinstance(stack, str) or not stack.depth:
            return "", []
        size = None if self.tokens is None or task.tokenizer is None else states_size(stack, self.tokens)
        blocks = f"the first {stack.depth} of {len(stack.blocks)} blocks"
        if task.varies:
            return f"{blocks} are frozen and computed in every step ({task.varies})", []
        if options.trunk_cache == "off" or (size or 0) > parse_size(options.trunk_cache):
            return f"{blocks} are frozen and computed in every step (training.trunk_cache={options.trunk_cache})", []

        several = False  # states a token, or others than those of tokens

        def enough(_: Any, __: Any, out: Any) -> None:
            nonlocal several
            hidden = out[0] if isinstance(out, tuple) else out
            several = "bbox" in batch and (isinstance(hidden, tuple) or hidden.shape[:2] != batch["input_ids"].shape)
            raise _Enough

        hook = stack.blocks[stack.depth - 1].register_forward_hook(enough)
        with ready_weights(model, self._ready(recipe)) as copies, trace.phase("trunk"), torch.no_grad(), suppress(_Enough):
            trace.follow(copies, "ready")
            call()
        del copies
        hook.remove()
        if several:
            return f"{blocks} are frozen and computed in every step (they give other than one state a token)", []
        room = f"up to {options.trunk_cache}" if size is None else f"at most {shown_size(size)}"
        said = f"{blocks} are frozen and computed once a row; what they give lies on the disk ({room}), not in memory"
        return said, list(stack.blocks[: stack.depth])

    def _read(self, trace: Trace, model: Any, task: Task, rows: Batch) -> None:
        """A batch of evaluation, in the arithmetic in which the test rows are read."""
        model.eval()
        batch = {k: faked(trace, v) for k, v in rows.items()}
        precision = NAMES[task.storage.dtype]
        with trace.phase("evaluate"), torch.no_grad(), autocast_of(precision):
            task.answers(model, batch)

    def _load(self, weights: dict[str, int], model: Any, storage: Storage) -> Moment:
        """The weights; for a GPU they are put together in the host's memory and then moved. Those that are quantised go
        where they belong one by one: beside them are the largest as it is read and what is not given back yet."""
        if storage.weights in FLOATS:
            return Moment(dict(weights), dict(weights) if self.device == "cuda" else {})
        largest = max(count for _, count in counted(model)) * storage.dtype.itemsize
        work = {"workspace": largest + READ_BEFORE_TIDYING}
        return Moment({**weights, **work}, work if self.device == "cuda" else {})

    def _surroundings(self, moments: dict[str, Moment]) -> None:
        for moment in moments.values():
            process = {"process": self.process}
            if self.device == "cpu":
                moment.device = {**process, **moment.device, **moment.host}
                moment.host = {}
            else:
                moment.device = {**overhead_of(self.device), **moment.device}
                moment.host = {**process, **moment.host}
