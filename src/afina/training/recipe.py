"""The recipe: everything a run is made from, as a person writes it and as a run folder keeps it.

An option is documented once, beside its field; the command line takes its help and limits from here. All that is wrong
with a recipe is raised together, each option named as it was typed.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from afina.core.config import AdapterConfig, check_limits, option
from afina.data.options import DataOptions
from afina.errors import ConfigError, Problems, did_you_mean
from afina.memory.sizes import parse_size
from afina.memory.storage import STORAGES
from afina.tasks.catalogue import find_task, task_options, tasks
from afina.training.optimizers import OPTIMIZERS, SCHEDULES
from afina.training.trackers import check_trackers

__all__ = [
    "DEFAULT_BATCH",
    "DEFAULT_TASK",
    "ENGINES",
    "DataOptions",
    "DistributedOptions",
    "MemoryOptions",
    "Recipe",
    "TrainingOptions",
    "parse_value",
    "read_recipe",
]

DEFAULT_MODEL = "minilm"
DEFAULT_TASK = "sequence_classification"
DEFAULT_BATCH = 16
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# Where the command line's defaults for a method differ from the library's, which are PEFT's.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear"},
}
LEARNING_RATES = {"last_layers": 1e-4, "prompt_tuning": 1e-2, "p_tuning": 1e-2, "prefix_tuning": 1e-2}
DEFAULT_LEARNING_RATE = 1e-3
# Options whose text on the command line may be a list of names: `target_modules=query,value`.
LISTS = {
    "exclude_modules", "feedforward_modules", "layers_to_transform", "modules_to_save", "target_modules",
    "target_parameters", "target_scope", "token_indices", "trainable_token_indices",
}  # fmt: skip
NAMED = {"method": "lora", "task": DEFAULT_TASK}  # keys of a recipe that hold a name and options
NOT_IN_RECIPES = {f.name for f in dataclasses.fields(AdapterConfig)} | {"fan_in_fan_out"}


@dataclasses.dataclass
class TrainingOptions:
    """How to train."""

    epochs: int = option(5, "passes over the training rows", low=1)
    batch_size: int | str = option(
        DEFAULT_BATCH, f"rows of one step, over all processes; auto: {DEFAULT_BATCH}, in as many parts as memory asks for"
    )
    batch_tokens: int = option(
        0, "tokens of one step, padding included, instead of batch_size: many short rows or few long ones, each with its "
        "share of the step; 0: a step is batch_size rows", low=0,
    )  # fmt: skip
    packing: str = option(
        "auto", "rows of a step one behind the other, without padding, none seeing another; auto: where the attention has "
        "kernels for rows of any length (FlashAttention), elsewhere rows of like length are padded",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    gradient_accumulation: int | str = option(
        1, "parts a step is computed in, to save memory; changes no result; auto: as few as fit, by measuring"
    )
    evaluation_batch_size: int | None = option(
        None, "rows read at once where nothing is learned; None: twice those of a step, fewer where memory is short", low=1
    )
    learning_rate: float | None = option(None, "peak learning rate; None: what suits the method", low=1e-9)
    warmup: float = option(0.1, "share of steps in which the learning rate rises", low=0.0, high=1.0)
    weight_decay: float = option(0.01, "decay of matrices; vectors have none", low=0.0)
    max_grad_norm: float = option(1.0, "longer gradients are cut to this length", low=1e-9)
    max_length: int | None = option(None, "tokens of a text; None: the longest, up to what the model can take", low=2)
    max_truncated: float = option(0.3, "largest share of texts that may be cut off", low=0.0, high=1.0)
    precision: str = option("auto", "of the arithmetic", choices=("auto", "fp32", "bf16", "fp16"))
    optimizer: str = option("adamw", "what moves the weights; 8 bits need afina[bitsandbytes]", choices=OPTIMIZERS)
    schedule: str = option("linear", "of the learning rate after its rise", choices=SCHEDULES)
    frozen_dropout: str = option(
        "off", "in blocks below all that is trained; off: they are computed once a row; keep: in every step",
        choices=("off", "keep"),
    )  # fmt: skip
    trunk_cache: str = option("4GB", "room on the disk for what frozen blocks give; off: they are computed in every step")
    label_smoothing: float = option(0.0, "share of the target that is spread over all classes", low=0.0, high=0.9)
    best: str | None = option(None, "figure that chooses the weights that are kept; None: the first of the task")
    evaluate_every: float = option(1.0, "epochs or steps between evaluations on the validation rows", low=0.001)
    evaluate_unit: str = option("epochs", "what evaluate_every counts", choices=("epochs", "steps"))
    patience: int = option(0, "evaluations in a row without a better one that end the run; 0: none do", low=0)
    checkpoint_every: int = option(0, "steps between checkpoints; 0: one at each evaluation alone", low=0)
    keep_checkpoints: int = option(1, "last checkpoints that are kept, beside the best", low=1)
    seed: int = option(0, "of the split, the new weights and the order of rows", low=0)
    trackers: list[str] = option(None, "where figures go too: mlflow, tensorboard, trackio, wandb", factory=list)

    @property
    def rows(self) -> int:
        """Rows of a step, over all processes; `Recipe.check` has made a number of what was asked. See `batch_tokens`."""
        assert isinstance(self.batch_size, int)
        return self.batch_size

    def at_once(self, longest: int, pieces: int) -> int:
        """Rows of the largest of the pieces that a step is computed in, by parts and processes. With `batch_tokens`, as many
        rows of `longest` tokens as take no less than any piece."""
        if not self.batch_tokens:
            return -(-self.rows // pieces)
        rows = max(self.batch_tokens // longest - 1, 0) // pieces + 1  # of a piece, where all rows are the longest
        shorter = self.batch_tokens // (pieces * rows + 1)  # tokens of the longest rows of which a piece has one more
        return rows + ((rows + 1) * shorter > rows * longest)

    def parts_for(self, rows: int, longest: int, processes: int) -> int:
        """The fewest parts of a step of which none is larger than `rows` rows of `longest` tokens."""
        return next(parts for parts in count(1) if self.at_once(longest, parts * processes) <= rows)

    @property
    def read_at_once(self) -> int:
        """Rows of a batch where nothing is learned."""
        return self.evaluation_batch_size or self.rows * 2


@dataclasses.dataclass
class MemoryOptions:
    """What is kept where."""

    limit: str | None = option(
        None, "memory of the device that the run may take, for example 11GB; the cheapest settings that fit are chosen"
    )
    weights: str = option(
        "auto", "storage of the frozen weights; auto: as the checkpoint has them where they are 16-bit and so is the "
        "arithmetic, else fp32; int8, nf4 and fp4 need afina[bitsandbytes], int8_weight_only afina[torchao]",
        choices=("auto", *STORAGES),
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "keep the input of each block alone and compute the block again in backward: less memory, a third more time"
    )
    activation_offload: bool = option(False, "keep what backward needs in the host's memory, where the device is a GPU")

    @property
    def tight(self) -> bool:
        """Whether memory counts for more than time."""
        return self.limit is not None or self.gradient_checkpointing

    def roomy(self, device: str) -> bool:
        """Whether time counts for more than memory: on a CPU, which has more of the one than of the other."""
        return device == "cpu" and not self.tight


@dataclasses.dataclass
class DistributedOptions:
    """How several processes share the work."""

    engine: str = option(
        "ddp", "ddp: a whole model each; fsdp2: weights in shards, by torch; zero2 and zero3: by afina[deepspeed]",
        choices=ENGINES,
    )  # fmt: skip
    offload: bool = option(False, "with zero2 or zero3: what is in shards lies in the host's memory")


@dataclasses.dataclass
class Recipe:
    """A whole run."""

    task: dict[str, Any] = option(None, "what a row means, and its options", factory=lambda: {"name": DEFAULT_TASK})
    model: str = option(DEFAULT_MODEL, "minilm (shipped with afina[demo]), a folder, or a hub id")
    start: str | None = option(None, "a run or an adapter folder, whose adapter is trained further; None: a new adapter")
    data: DataOptions = option(None, "the examples", factory=DataOptions)
    method: dict[str, Any] = option(None, "name of the method, and its options", factory=lambda: {"name": "lora"})
    training: TrainingOptions = option(None, "how to train", factory=TrainingOptions)
    memory: MemoryOptions = option(None, "what is kept where", factory=MemoryOptions)
    distributed: DistributedOptions = option(None, "how several processes share the work", factory=DistributedOptions)

    def check(self, problems: Problems, spell: Callable[[str], str] = str) -> Any:
        """Resolve what was left open and add everything that is wrong; returns the method's configuration, or None."""
        from afina.core.registry import get_method

        _check_types(self, problems, spell, "")
        self._check_parts(problems, spell)
        _check_all(self, problems, spell, "")
        check_trackers(self.training.trackers, problems, spell)
        task_type = self._check_task(problems, spell)
        name = str(self.method.get("name", ""))
        try:
            method = get_method(name)
        except ConfigError as error:
            problems.add(f"{spell('method.name')}: {error}")
            return None
        if self.training.learning_rate is None:
            self.training.learning_rate = LEARNING_RATES.get(name, DEFAULT_LEARNING_RATE)
        given = {k: v for k, v in self.method.items() if k != "name"}
        fields = {f.name for f in dataclasses.fields(method.config)}
        unknown = [key for key in given if key not in fields]
        for key in unknown:
            known = fields - NOT_IN_RECIPES
            near = did_you_mean(key, known)
            problems.add(f"{spell(f'method.{key}')} is no option of {name}.{near} See `afina methods {name}`.")
        if unknown:
            return None
        if self.training.packing == "on" and "num_virtual_tokens" in fields:
            problems.add(
                f"{spell('training.packing')}=on: {name} puts its tokens in front of each row, and packed rows have one "
                "front for all; leave it out"
            )
        try:
            suited = find_task(self.task["name"]).method_defaults(name) if self.task["name"] in tasks() else {}
            return method.make_config(**{**METHOD_DEFAULTS.get(name, {}), **suited, **given, "task_type": task_type})
        except ConfigError as error:
            problems.add(str(error))
            return None

    def _check_parts(self, problems: Problems, spell: Callable[[str], str]) -> None:
        """Rows of a step and its parts, where they may be `auto`; the limit of memory."""
        options = self.training
        if options.batch_size == "auto":
            options.batch_size, options.gradient_accumulation = DEFAULT_BATCH, "auto"
        for key in ("batch_size", "gradient_accumulation"):
            value = getattr(options, key)
            if (key, value) != ("gradient_accumulation", "auto") and (type(value) is not int or value < 1):
                problems.add(f"{spell(f'training.{key}')}={value!r}: expected a number of at least 1, or auto")
                setattr(options, key, 1)
        rows, parts = options.batch_size, options.gradient_accumulation
        if parts != "auto" and options.evaluation_batch_size is None:
            options.evaluation_batch_size = options.read_at_once
        if not options.batch_tokens and isinstance(rows, int) and isinstance(parts, int) and rows < parts:
            problems.add(
                f"{spell('training.gradient_accumulation')}={parts}: a step of {rows} rows ({spell('training.batch_size')}) "
                "has no more parts than that"
            )
        if options.trunk_cache != "off":
            try:
                parse_size(options.trunk_cache)
            except ConfigError as error:
                problems.add(f"{spell('training.trunk_cache')}: {error}, or off")
        if self.memory.limit is not None:
            try:
                parse_size(self.memory.limit)
            except ConfigError as error:
                problems.add(f"{spell('memory.limit')}: {error}")
        if self.distributed.offload and not self.distributed.engine.startswith("zero"):
            problems.add(
                f"{spell('distributed.offload')}: {self.distributed.engine} keeps everything on the devices; "
                "take engine zero2 or zero3"
            )

    def _check_task(self, problems: Problems, spell: Callable[[str], str]) -> str | None:
        """Resolve the task's options and the figure that chooses; returns PEFT's name for the kind of model."""
        name = str(self.task.get("name", ""))
        try:
            task = find_task(name)
        except ConfigError as error:
            problems.add(f"{spell('task.name')}: {error}")
            return None
        options = task_options(task, {k: v for k, v in self.task.items() if k != "name"}, problems, spell)
        for wrong in task.wrong_options(options):
            key, space, rest = wrong.partition(" ")
            problems.add(f"{spell(f'task.{key}')}{space}{rest}")
        self.task = {"name": name, **dataclasses.asdict(options)}
        if self.training.label_smoothing and not task.smooths:
            asked = f"{spell('training.label_smoothing')}={self.training.label_smoothing}"
            problems.add(f"{asked}: {name} has no classes to spread a target over; leave it out")
        if self.training.packing == "on" and not task.packs:
            problems.add(f"{spell('training.packing')}=on: only rows of causal_lm are packed, not of {name}; leave it out")
        best = self.training.best
        chooses = [key for key, figure in task.figures.items() if not figure.final]
        if best is not None and best not in chooses:
            near = did_you_mean(best, chooses)
            problems.add(f"{spell('training.best')}={best!r}: {name} has no such figure.{near}")
        return task.task_type

    def resolve_method(self, config: AdapterConfig) -> None:
        """Write every option of the method that says something, so that the recipe alone repeats the run."""
        values = {k: v for k, v in config.to_dict().items() if k not in NOT_IN_RECIPES and k != "peft_type"}
        values = {k: v for k, v in values.items() if v is not None and v != {} and v != []}
        self.method = {"name": self.method["name"], **values}

    def to_yaml(self) -> str:
        """The recipe as a file."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True, width=120)


def _check_types(options: Any, problems: Problems, spell: Callable[[str], str], above: str) -> None:
    """Read values as those of a file are read, whoever wrote them. One that cannot be is told, and gives way to the
    default, so that what else is wrong is found too."""
    hints = typing.get_type_hints(type(options))
    for f in dataclasses.fields(options):
        value, hint = getattr(options, f.name), hints[f.name]
        if dataclasses.is_dataclass(hint) and isinstance(value, hint):  # type: ignore[arg-type]
            _check_types(value, problems, spell, f"{above}{f.name}.")
            continue
        try:
            if dataclasses.is_dataclass(hint):
                raise ValueError(f"expected {hint.__name__}(...)")  # type: ignore[union-attr]
            setattr(options, f.name, parse_value(value, hint))
        except ValueError as error:
            problems.add(f"{spell(f'{above}{f.name}')}={value!r}: {error}")
            setattr(options, f.name, getattr(type(options)(), f.name))


def _check_all(options: Any, problems: Problems, spell: Callable[[str], str], above: str) -> None:
    """The limits of a dataclass and of those below it."""
    check_limits(options, problems, lambda name: spell(f"{above}{name}"))
    for f in dataclasses.fields(options):
        if dataclasses.is_dataclass(value := getattr(options, f.name)):
            _check_all(value, problems, spell, f"{above}{f.name}.")


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file; raises ConfigError with every key that is unknown or of the wrong type."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = [p.name for p in path.parent.glob("[!.]*.y*ml")] if path.parent.is_dir() else []
        near = did_you_mean(path.name, there)
        raise ConfigError(f"there is no recipe {path}.{near} Paths are read from the folder the command runs in") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    problems = Problems(str(path))
    if not isinstance(content, Mapping):
        start = f"model: {DEFAULT_MODEL}\ndata:\n  file: rows.csv"
        raise ConfigError(f"{path} holds no recipe; it begins, for example, with\n{start}")
    recipe: Recipe = _filled(Recipe, content, "", problems)
    problems.raise_as(ConfigError)
    return recipe


def _filled(cls: type, content: Mapping[str, Any], above: str, problems: Problems) -> Any:
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in content.items():
        where = f"{above}{key}"
        if key not in hints:
            problems.add(f"{where} is no key of a recipe.{did_you_mean(str(key), hints)}")
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                values[key] = _filled(hints[key], value, f"{where}.", problems)  # type: ignore[arg-type]
            else:
                problems.add(f"{where}={value!r}: expected the keys {', '.join(typing.get_type_hints(hints[key]))} below it")
        elif where in NAMED:
            values[key] = {"name": value} if isinstance(value, str) else value
            if not isinstance(values[key], Mapping) or "name" not in values[key]:
                form = f"expected a name, such as {NAMED[key]}, or the key name and the {key}'s options below it"
                problems.add(f"{key}: {form}")
                del values[key]
        else:
            try:
                values[key] = parse_value(value, hints[key])
            except ValueError as error:
                problems.add(f"{where}={value!r}: {error}")
    return cls(**values)


def parse_value(value: Any, hint: Any, *, several: bool = False) -> Any:
    """A value typed on the command line or in a file, as the type its field is declared with.

    `several`: text may be a list of names separated by commas. Raises ValueError saying what was expected.
    """
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    if isinstance(value, str) and str not in kinds:
        value = _from_text(value, several or any(typing.get_origin(kind) is list for kind in kinds))
    if value is None and type(None) in kinds:
        return None
    if Any in kinds:
        return value
    if isinstance(value, str) and int in kinds and value.strip().isdigit():
        value = int(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a table {name: value}",
             list: "a list"}  # fmt: skip
    for kind in kinds:
        plain = typing.get_origin(kind) or kind
        if plain is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if plain is str and isinstance(value, bool) and bool not in kinds:
            return "on" if value else "off"  # which YAML 1.1 takes for words of truth
        if plain is str and isinstance(value, str | int | float):
            return str(value)
        if isinstance(plain, type) and isinstance(value, plain) and (plain is not int or not isinstance(value, bool)):
            return value
    expected = [names[plain] for kind in kinds if (plain := typing.get_origin(kind) or kind) in names]
    raise ValueError(f"expected {' or '.join(expected) or hint}")


def _from_text(text: str, several: bool) -> Any:
    """A number, a list of names or numbers where several may be meant, or what YAML makes of the text."""
    if text.lstrip("+-").isdigit():
        return [int(text)] if several else int(text)
    try:
        return float(text)  # YAML 1.1 reads 1e-3 as text
    except ValueError:
        pass
    words = [word.strip() for word in text.split(",")]
    if several and all(word.isdigit() for word in words):
        return [int(word) for word in words]
    if several and text != "all-linear" and all(re.fullmatch(r"[A-Za-z_][\w.-]*", word) for word in words):
        return None if text.lower() in ("null", "none") else words
    try:
        return None if text.lower() == "none" else yaml.safe_load(text)
    except yaml.YAMLError:
        return text
