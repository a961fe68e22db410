"""What a recipe takes of memory, known before anything is loaded: `Planner`.

The model is built on the meta device from its configuration, adapted as it would be, and a step of training and a batch of
evaluation are run on it without contents (`memory.trace`), with the longest rows there are. So the plan follows what the
code does. Where there is no data file, rows of `training.max_length` tokens stand for it, and where there is no tokenizer,
one that knows a single word.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.core.codecs import logical_numel
from afina.core.codecs.outline import OutlineLinear
from afina.data.columns import chosen_columns
from afina.data.divide import divided as divide_rows
from afina.data.example import Example
from afina.data.sources import read_rows
from afina.errors import ConfigError, Problems
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
from afina.memory.storage import FLOATS, Storage, settled_weights
from afina.memory.trace import Trace, faked
from afina.tasks.catalogue import find_task, tasks
from afina.tasks.reference import REFERENCE
from afina.tasks.task import Batch, Feature, Task, length_of
from afina.training.cache import encoded_once
from afina.training.fast_path import states_size
from afina.training.models import ModelSource, aim, find_model, load_config, load_processor, load_tokenizer
from afina.training.optimizers import make_optimizer
from afina.training.precision import choose_precision
from afina.training.recipe import Recipe
from afina.training.rows_for_plans import one_word_tokenizer, rows_of_words
from afina.training.start import find_start
from afina.training.vocabulary import add_tokens, fit_embeddings

__all__ = ["Planner", "planner_for", "planner_of"]

_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_BLOCK = 256  # weights of an 8-bit optimizer's state that share a scale
_PROCESS = 500_000_000  # bytes of Python with its libraries
_SMALL = 4096  # parameters with fewer values keep a float32 state in an 8-bit optimizer


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
        lean_step(model, torch.device("cpu"), gradient_checkpointing=memory.gradient_checkpointing)
        assert isinstance(options.gradient_accumulation, int)
        at_once = options.at_once(self.longest, self.processes * options.gradient_accumulation)
        wide = _vocabulary(model)
        batches = [
            task.collate(self.features[side][:count])
            for side, count in (("train", at_once), ("evaluate", options.read_at_once))
        ]
        trace = Trace(hidden=hidden_of(self.device), wide=wide)
        products = short_attention() if self.device == "cpu" and self.precision == "bf16" else nullcontext()
        drawn = quick_dropout() if self.device == "cpu" else nullcontext()
        with kernels_of(self.device), products, drawn, trace:
            trained = _placed(trace, model)
            disk, known = self._trunk(trace, model, task, batches[1], recipe)
            optimizer = _optimizer(trace, options.optimizer, trained, options.weight_decay)
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
            gathered = _gathered(model, weights) if engine.engine != "ddp" else 0
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

    def _trunk(
        self, trace: Trace, model: Any, task: Task, rows: Batch, recipe: Recipe
    ) -> tuple[str, list[nn.Module]]:
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

        def enough(*_: Any) -> None:
            raise _Enough

        hook = stack.blocks[stack.depth - 1].register_forward_hook(enough)
        with trace.phase("trunk"), torch.no_grad(), suppress(_Enough):
            call()
        hook.remove()
        room = f"up to {options.trunk_cache}" if size is None else f"at most {shown_size(size)}"
        said = f"{blocks} are frozen and computed once a row; what they give lies on the disk ({room}), not in memory"
        return said, list(stack.blocks[: stack.depth])

    def _read(self, trace: Trace, model: Any, task: Task, rows: Batch) -> None:
        """A batch of evaluation, in the arithmetic in which the test rows are read."""
        model.eval()
        batch = {k: faked(trace, v) for k, v in rows.items()}
        precision = _NAMES[task.storage.dtype]
        with trace.phase("evaluate"), torch.no_grad(), autocast_of(precision):
            task.answers(model, batch)

    def _load(self, weights: dict[str, int], model: Any, storage: Storage) -> Moment:
        """The weights; for a GPU they are put together in the host's memory and then moved. Those that are quantised go
        where they belong one by one: beside them are the largest as it is read and what is not given back yet."""
        if storage.weights in FLOATS:
            return Moment(dict(weights), dict(weights) if self.device == "cuda" else {})
        largest = max(logical_numel(p) for p in model.parameters()) * storage.dtype.itemsize
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


def planner_for(
    recipe: Recipe, device: str, *, processes: int | None = None, spell: Callable[[str], str] = str,
    problems: Problems | None = None,
) -> Planner:  # fmt: skip
    """A planner from a recipe alone; the recipe's open settings (weights, batch) are resolved in place.

    Raises ConfigError with all that is wrong in the options, DataError with what is wrong in the file.
    """
    problems = problems or Problems("the recipe")
    start = find_start(recipe, problems, spell)
    config = recipe.check(problems, spell)
    if start is not None and config is not None:
        config = start.settled(recipe, config, problems, spell)
    source = None
    try:
        chosen = tasks().get(str(recipe.task["name"]))
        source = find_model(recipe.model, pipeline=chosen is not None and chosen.pipelines)
        load_config(source)
    except ConfigError as error:
        problems.add(f"{spell('model')}: {error}")
    has_file = bool(recipe.data.file) and (Path(recipe.data.file).exists() or recipe.training.max_length is None)
    files = recipe.task["name"] in tasks() and find_task(recipe.task["name"]).reads_files
    if files:
        has_file = has_file and Path(recipe.data.file).exists()
    elif not has_file and recipe.training.max_length is None:
        problems.add(
            f"{spell('training.max_length')} is missing: without {spell('data.file')} the length of the rows has to be said"
        )
    problems.raise_as(ConfigError)
    assert source is not None
    made = find_task(recipe.task["name"])
    options = made.Options(**{k: v for k, v in recipe.task.items() if k != "name"})
    notes: list[str] = []
    processor = load_processor(source, made.processor_kind) if files else _tokenizer(source)
    if processor is None:
        processor = one_word_tokenizer(load_config(source))
        notes.append("there is no tokenizer beside the configuration, so every row is taken to have the full length")
        has_file = False
        if recipe.training.max_length is None:
            raise ConfigError(f"{spell('training.max_length')} is missing: without a tokenizer rows cannot be measured")
    if not files:
        add_tokens(processor, recipe.data.new_tokens)
    if has_file:
        kind = made.kind_for(recipe.task)
        table = read_rows(recipe.data, kind)
        columns = chosen_columns(table, kind, recipe.data, problems, spell)
        problems.raise_as(ConfigError)
        done = divide_rows(table, kind, recipe.data, columns=columns, seed=recipe.training.seed)
        sides = {name: [done.examples[i] for i in rows] for name, rows in done.sides.items()}
    elif (rows := made.stand_ins(options)) is not None:
        sides = {name: list(rows) for name in ("train", "validation", "test")}
        of_classes = f", with {len(rows)} classes" if made.kind.labels in ("class", "classes") else ""
        notes.append(f"no data file was read: every row is taken to be as large as they come{of_classes}")
    else:
        assert recipe.training.max_length is not None
        sides = {name: rows_of_words(made, options, recipe.training.max_length) for name in ("train", "validation", "test")}
        notes.append(
            f"no data file was read: every row is taken to have {recipe.training.max_length} tokens"
            + (", with 2 classes" if made.kind.labels in ("class", "classes") else "")
        )
    learned = made.learn(sides["train"], [*sides["validation"], *sides["test"]])
    task = made(processor, options, learned)
    if device == "cpu":
        precision = choose_precision(recipe.training.precision, torch.device("cpu"))
    else:
        precision = "bf16" if recipe.training.precision == "auto" else recipe.training.precision
        if recipe.training.precision == "auto":
            notes.append("the GPU is taken to compute in bf16 (training.precision: auto)")
    recipe.memory.weights = settled_weights(recipe.memory.weights, load_config(source), precision)
    return planner_of(recipe, task, source, config, sides, device, precision, processes=processes, notes=notes)


def planner_of(
    recipe: Recipe, task: Task, source: ModelSource, config: Any, sides: Mapping[str, list[Example]], device: str,
    precision: str, *, processes: int | None = None, notes: Sequence[str] = (),
) -> Planner:  # fmt: skip
    """A planner of what is known already: the task, the method's configuration, the examples of each side.

    `notes` say for what the examples stand; with none they are those of a file.
    """
    outline = copy.copy(task)
    outline.storage = Storage("fp32", empty=True)
    base = outline.load_model(source.path)
    task.learned |= outline.learned
    limit = task.limit(base) - int(getattr(config, "num_virtual_tokens", None) or 0)
    if recipe.training.max_length is not None and recipe.training.max_length > limit:
        raise ConfigError(f"training.max_length={recipe.training.max_length}: {recipe.model} takes at most {limit} tokens")
    everything = [e for examples in sides.values() for e in examples]
    encode = outline.encode if notes else partial(encoded_once, outline)  # which needs no weights
    made = encode(everything, recipe.training.max_length, limit).features
    largest = "validation" if len(sides["validation"]) > len(sides["test"]) else "test"
    ends = dict(zip(sides, accumulate(len(examples) for examples in sides.values()), strict=True))
    features: dict[str, Sequence[Feature]] = {}
    for name, side in (("train", "train"), ("evaluate", largest)):
        first = ends[side] - len(sides[side])
        own = [f for f in made if first <= f["row"] < ends[side]]
        own = sorted(own, key=length_of, reverse=True)
        most = max(recipe.training.at_once(length_of(own[0]), 1), recipe.training.read_at_once)
        features[name] = own[:most]
        if notes:  # as many as are asked for
            features[name] = [own[i % len(own)] for i in range(most)]
    said = list(notes)
    if not notes:
        longest = max(length_of(f) for f in (*features["train"], *features["evaluate"]))
        if longest > 1:
            said.append(f"planned with the longest rows of the file: {longest} {task.unit}")
    count = processes if processes is not None else int(os.environ.get("WORLD_SIZE", "1"))
    process = resident() if count == 1 else _PROCESS  # the same in each, so that all choose the same
    twice = recipe.start is not None and task.compares
    tokens = None if notes else sum(length_of(f) for f in made if f["row"] < ends["validation"])
    return Planner(task, source, config, features, device, precision, count, said, twice, process, tokens)


def _tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer; None where there is only a configuration."""
    folder = Path(source.path)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("*vocab*")):
        return None
    try:
        return load_tokenizer(source)
    except ConfigError:
        if folder.is_dir():
            raise
        return None


# --- the model in a trace


def _placed(trace: Trace, model: nn.Module) -> list[Any]:
    """Put the model's tensors into the trace, each with its part; returns the trained parameters."""
    made: dict[int, Any] = {}
    trained = []
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new: Any = faked(trace, tensor)
                    part = _weights_part(module, tensor)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                        new.__dict__.update(tensor.__dict__)
                        if tensor.requires_grad:
                            part = "adapters"
                            trained.append(new)
                    made[id(tensor)] = (tensor, new)  # the old one too, so that its number is not given again
                    trace.follow([new], part)
                held[name] = made[id(tensor)][1]
    return trained


def _weights_part(module: nn.Module, tensor: torch.Tensor) -> str:
    if isinstance(module, OutlineLinear) and (tensor is module.weight or tensor is module.scales):
        return f"weights {module.kind}"
    return f"weights {_NAMES[tensor.dtype]}" if tensor.dtype in _NAMES else "workspace"


def _optimizer(trace: Trace, name: str, trained: list[Any], decay: float) -> Any:
    """The optimizer with its state, as it is after the first step, and the copies of trained weights that a run keeps.

    Those from bitsandbytes are not run, since their kernels take contents: their state is made here, of the size it has.
    """
    trace.kept += [p.detach().clone() for p in trained for _ in range(2)]
    trace.follow(trace.kept, "copies")
    if "8bit" in name:
        count = 1 if name.startswith("lion") else 2
        state = [x for p in trained for x in _state_8bit(p, count)]
        if not name.startswith("paged"):
            trace.follow(state, "optimizer")
            trace.kept += state
        return None
    optimizer = make_optimizer(name, {str(i): p for i, p in enumerate(trained)}, 1e-3, decay)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in trained:
        p.grad = None
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    trace.follow(states, "optimizer")
    return optimizer


def _state_8bit(p: torch.Tensor, count: int) -> list[torch.Tensor]:
    if p.numel() < _SMALL:
        return [torch.zeros_like(p, dtype=torch.float32) for _ in range(count)]
    scales = [torch.zeros(-(-p.numel() // _BLOCK)) for _ in range(count)]
    return [*(torch.zeros_like(p, dtype=torch.uint8) for _ in range(count)), *scales]


def _gathered(model: Any, weights: Mapping[str, int]) -> int:
    """Frozen bytes that are whole at once where weights lie in shards: two blocks, one at work and one on its way."""
    blocks = [m for m in model.modules() if type(m).__name__.endswith(("Block", "Layer", "DecoderLayer"))]
    sizes = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in blocks]
    table = _table(model)
    embeddings = table.weight.numel() * table.weight.element_size() if table is not None else 0
    return min(sum(weights.values()), max(2 * max(sizes, default=0), embeddings))


def _table(model: Any) -> Any:
    """The embeddings of tokens; None where there are none."""
    try:
        found = model.get_base_model().get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def _vocabulary(model: Any) -> int:
    """Rows of the embeddings of tokens; 0 where there are none."""
    table = _table(model)
    return 0 if table is None else int(table.weight.shape[0])
