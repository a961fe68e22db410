"""Which runs a server answers with, and on which bases: a base is in memory once, whatever the number of its adapters.

Runs share a base where it is the same folder or hub id, stored alike, with a head of the same kind and the same padding
token. Heads may differ in size. An adapter that does not fit beside the others (an enlarged vocabulary, say) gets a base of
its own, and one that cannot be one of several in a batch is asked in batches of its own: that is tried when it is loaded.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.core.adapter import SavedModule
from afina.core.checkpoint import PREFIX, read_state
from afina.core.injection import AdapterSet
from afina.core.runtime import BASE_ROW, Rows, State
from afina.errors import AfinaError, CheckpointError, ConfigError, Problems, did_you_mean
from afina.memory.storage import Storage
from afina.model import PeftModel
from afina.serving.request_error import RequestError
from afina.tasks.causal_lm import CausalLM
from afina.tasks.sentence_similarity import SentenceSimilarity
from afina.tasks.seq2seq import Seq2Seq
from afina.tasks.task import Task
from afina.tasks.writing import WritingTask
from afina.training.loop import make_engine
from afina.training.models import ModelSource, load_tokenizer
from afina.training.trained import TrainedRun

__all__ = ["Lane", "Models", "Served", "find_served", "load_models", "named_runs"]


@dataclass
class Lane:
    """One base with its adapters; its rows are computed together."""

    source: ModelSource
    storage: Storage
    model: PeftModel
    device: torch.device
    writes: bool
    limit: int  # tokens that the base takes
    served: list[Served] = field(default_factory=list)
    mixture: tuple[tuple[str, ...], State] | None = None  # the last one, which the next token's often equals

    @property
    def adapters(self) -> AdapterSet:
        """The adapters of the base."""
        return self.model.adapters

    def state(self, adapters: Sequence[str]) -> State:
        """What a forward pass is to do whose rows use these adapters."""
        if len({*adapters}) > 1:
            names = tuple(adapters)
            if self.mixture is None or self.mixture[0] != names:
                self.mixture = names, State(rows=Rows(names, steady=True))
            return self.mixture[1]
        return State(enabled=False) if adapters[0] == BASE_ROW else State((adapters[0],))


@dataclass
class Served:
    """One name that can be asked for: a run, or the base of a run as it was before (`adapter` is then BASE_ROW)."""

    name: str
    run: TrainedRun
    lane: Lane
    adapter: str
    created: int
    mixes: bool = True  # whether its rows can be computed with those of others
    whole: str = ""  # why texts are written by one call for all of a batch, where they are
    lock: threading.Lock = field(default_factory=threading.Lock)  # around the tokenizer, which two threads may not use

    @property
    def task(self) -> Task:
        """What it answers with."""
        return self.run.task

    @property
    def tuned(self) -> bool:
        """Whether there is an adapter."""
        return self.adapter != BASE_ROW


@dataclass
class Models:
    """All names, and the bases behind them."""

    by_name: dict[str, Served]
    lanes: list[Lane]
    notes: list[str]


def named_runs(given: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER or FOLDER, whose name is then that of the folder. Raises ConfigError for names that are there twice."""
    problems, named = Problems("RUN"), dict[str, Path]()
    for one in given:
        name, mark, folder = one.partition("=")
        if not mark or Path(one).is_dir():
            name, folder = Path(one).resolve().name, one
        if not name.strip() or not folder:
            problems.add(f"{one!r}: expected FOLDER or NAME=FOLDER")
        elif name in named:
            problems.add(f"two runs are called {name!r} ({named[name]} and {folder}); give one another name: NAME={folder}")
        else:
            named[name] = Path(folder)
    problems.raise_as(ConfigError)
    return named


def load_models(runs: dict[str, Path], tell: Any = lambda line: None) -> Models:
    """Load every run. Raises CheckpointError with all that is wrong with the folders, before any base is loaded."""
    problems, described = Problems("afina serve"), {}
    for name, folder in runs.items():
        try:
            described[name] = TrainedRun.described(folder)
            task = described[name][1]
            if task.reads_files:
                cure = "ask it with `afina predict`"
                if task.kind.of_text:
                    cure += ", or train one on words and boxes alone (task.pictures=false)"
                problems.add(f"{folder}: {task.name} reads files, which a request does not hold; {cure}")
        except AfinaError as error:
            problems.add(str(error))
    problems.raise_as(CheckpointError)
    made = Models({}, [], [])
    lanes: dict[Any, list[Lane]] = {}
    for name, (recipe, task, source) in described.items():
        tell(f"loading {name}")
        key = (_place(source.path), task.storage, task.task_type, task.tokenizer.pad_token_id)
        served, reason = None, ""
        for lane in lanes.get(key, []):
            try:
                served = _joined(lane, name, runs[name], recipe, task)
                break
            except CheckpointError as error:
                reason = str(error)
        if served is None:
            served = _first(name, runs[name], recipe, task, source)
            lanes.setdefault(key, []).append(served.lane)
            made.lanes.append(served.lane)
            if reason:
                made.notes.append(f"{name} has a base of its own, beside the others it does not fit ({_short(reason)})")
        made.by_name[name] = served
    for lane in made.lanes:
        if lane.served[0].task.untuned and not _enlarged(lane):
            _add_base(made, lane)
    return made


def _short(reason: str) -> str:
    first = reason.splitlines()[0]
    return first if len(first) <= 120 else f"{first[:120]}…"


def find_served(models: Models, name: str) -> Served:
    """The model of that name. Raises RequestError (404) with the nearest names."""
    if name not in models.by_name:
        near = did_you_mean(name, models.by_name)
        raise RequestError(404, f"there is no model {name[:200]!r}.{near}", param="model", code="model_not_found")
    return models.by_name[name]


def _place(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _first(name: str, folder: Path, recipe: Any, task: Task, source: ModelSource) -> Served:
    """A run that brings its base."""
    base = task.load_model(source.path)
    rows = _rows(base)
    model = PeftModel.from_pretrained(base, folder / "adapter", "a0", tokenizer=task.tokenizer)
    device = make_engine("fp32").device
    lane = Lane(source, task.storage, model.to(device).eval(), device, isinstance(task, WritingTask), task.limit(base))
    lane.model.__dict__["_rows_of_checkpoint"] = rows
    return _served(lane, name, folder, recipe, task, "a0")


def _joined(lane: Lane, name: str, folder: Path, recipe: Any, task: Task) -> Served:
    """One more run on a base that is there."""
    storage = task.storage
    task.storage = replace(storage, empty=True)
    task.load_model(lane.source.path)  # what a task learns from the model it loads, without its weights
    task.storage = storage
    adapter = f"a{len(lane.served)}"
    with _heads_as_in(lane.adapters, folder / "adapter"):
        lane.model.load_adapter(folder / "adapter", adapter, tokenizer=task.tokenizer)
    lane.model.eval()
    return _served(lane, name, folder, recipe, task, adapter)


def _served(lane: Lane, name: str, folder: Path, recipe: Any, task: Task, adapter: str) -> Served:
    created = int((folder / "metrics.json").stat().st_mtime)
    served = Served(name, TrainedRun(folder, recipe, task, lane.model), lane, adapter, created)
    lane.served.append(served)
    return served


@contextmanager
def _heads_as_in(adapters: AdapterSet, folder: Path) -> Iterator[None]:
    """Inside the block, modules that are trained whole have the sizes of the adapter's file, so that copies fit it."""
    state, changed = read_state(folder), []
    for key, layer in adapters.layers.items():
        if "#" in key or not any(isinstance(adapter, SavedModule) for adapter in layer.adapters.values()):
            continue
        shapes = {name: state.get(f"{PREFIX}{key}.{name}") for name, _ in layer.view.layer.named_parameters()}
        if any(t is not None and t.shape != layer.view.layer.get_parameter(n).shape for n, t in shapes.items()):
            changed.append((layer.view, layer.view.layer))
            layer.view.layer = _resized(layer.view.layer, {n: t for n, t in shapes.items() if t is not None})
    try:
        yield
    finally:
        for view, original in changed:
            view.layer = original


def _resized(module: nn.Module, like: dict[str, torch.Tensor]) -> nn.Module:
    """A copy whose parameters have the shapes of `like`, without values."""
    made = copy.deepcopy(module)
    for name, tensor in like.items():
        owner = made.get_submodule(name.rpartition(".")[0])
        old = made.get_parameter(name)
        empty = torch.empty(tensor.shape, dtype=old.dtype, device=old.device)
        owner._parameters[name.rpartition(".")[2]] = nn.Parameter(empty, requires_grad=False)
        if isinstance(owner, nn.Linear) and name.endswith("weight"):
            owner.out_features, owner.in_features = tensor.shape
    return made


# --- the base, untuned


def _rows(base: Any) -> int:
    table = base.get_input_embeddings()
    return int(table.weight.shape[0]) if table is not None else 0


def _enlarged(lane: Lane) -> bool:
    """Whether an adapter brought embeddings of its own for the base."""
    return bool(_rows(lane.model.get_base_model()) != lane.model.__dict__["_rows_of_checkpoint"])


def _add_base(made: Models, lane: Lane) -> None:
    first = lane.served[0]
    name = Path(lane.source.name).name if Path(lane.source.name).is_dir() else lane.source.name
    if name in made.by_name:
        made.notes.append(f"the base {name!r} cannot be asked without an adapter: a run has its name")
        return
    run = copy.copy(first.run)
    run.task = _untuned(first.task, lane)
    served = Served(name, run, lane, BASE_ROW, int(time.time()))
    lane.served.append(served)
    made.by_name[name] = served


def _untuned(task: Task, lane: Lane) -> Task:
    """The task as it is without a run: no options and no template but the base's own."""
    tokenizer = load_tokenizer(lane.source)
    if isinstance(task, CausalLM):
        made: Task = CausalLM(tokenizer, None, {"form": "answers"})
    elif isinstance(task, Seq2Seq):
        kept: dict[str, Any] = {key: task.learned[key] for key in ("start", "target_limit") if key in task.learned}
        made = Seq2Seq(tokenizer, Seq2Seq.Options(generate=False), kept)
    else:
        assert isinstance(task, SentenceSimilarity)
        made = SentenceSimilarity(tokenizer, type(task.options)(pooling=task.pooling), {"scored": False})
        made.pooling = task.pooling
    made.storage = task.storage
    return made
