"""Configurations: dataclasses whose fields carry their own help and limits, read from and written to PEFT's JSON.

An option is documented once, beside its field. All that is wrong with a configuration is raised together. A key that a
file has and this version does not know is ignored by name where it says nothing (null, false, empty, or the known
default of a feature afina lacks) and an error where it means something (T13).
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from afina.errors import CheckpointError, ConfigError, Problems, did_you_mean

__all__ = [
    "CONFIG_NAME",
    "AdapterConfig",
    "PromptConfig",
    "TargetedConfig",
    "TaskType",
    "changed",
    "check_limits",
    "config_from_dict",
    "name_matches",
    "option",
    "resolve_file",
]

CONFIG_NAME = "adapter_config.json"
HUB_OPTIONS = frozenset({"revision", "token", "cache_dir", "local_files_only", "force_download"})
logger = logging.getLogger("afina")
C = TypeVar("C", bound="AdapterConfig")


class TaskType(str, enum.Enum):
    """What the adapted model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    def __str__(self) -> str:
        return self.value


def option(
    default: Any = None,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Collection[Any] | None = None,
    factory: Any = None,
) -> Any:
    """A dataclass field with its help text and limits (inclusive)."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_limits(options: Any, problems: Problems, spell: Callable[[str], str] = str) -> None:
    """Add every field whose value is outside the choices or limits of its `option`; `spell` says how it was typed."""
    for f in dataclasses.fields(options):
        value, limits = getattr(options, f.name), f.metadata
        if isinstance(value, enum.Enum):
            value = value.value
            setattr(options, f.name, value)
        choices = limits.get("choices")
        if choices is not None and value not in choices:
            near = did_you_mean(str(value), [str(c) for c in choices if isinstance(c, str)])
            near = near if near.startswith(" Did") else ""  # all that are known stand there already
            problems.add(f"{spell(f.name)}={value!r}: expected one of {', '.join(map(repr, choices))}.{near}")
        if isinstance(value, float) and not math.isfinite(value):  # which no comparison finds
            problems.add(f"{spell(f.name)}={value!r}: expected a finite number")
            continue
        for limit, wrong in ((limits.get("low"), "at least"), (limits.get("high"), "at most")):
            if limit is None or value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or (value < limit if wrong == "at least" else value > limit):
                problems.add(f"{spell(f.name)}={value!r}: expected a number of {wrong} {limit}")


class Described(type):
    """Makes a configuration take, as in PEFT's files, its own `peft_type` and the options afina lacks, as long as these
    ask for nothing; any other name is an error with the nearest one."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        problems, known = Problems(cls.__name__), {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in [n for n in kwargs if n not in known]:
            value, foreign = kwargs.pop(name), cls.foreign  # type: ignore[attr-defined]
            if name == "peft_type":
                if getattr(value, "value", value) not in (cls.peft_type, None):  # type: ignore[attr-defined]
                    problems.add(f"peft_type={str(value)!r}: this class configures {cls.peft_type!r}")  # type: ignore[attr-defined]
            elif name not in foreign:
                problems.add(f"{name}={value!r} is not an option.{did_you_mean(name, known | set(foreign))}")
            elif value not in (foreign[name], None, False, {}, []):
                problems.add(f"{name}={value!r} asks for something afina does not do")
        problems.raise_as(ConfigError)
        return super().__call__(*args, **kwargs)


@dataclasses.dataclass
class AdapterConfig(metaclass=Described):
    """What all methods have in common. PEFT's name for it is `PeftConfig`."""

    peft_type: ClassVar[str] = ""
    overrides: ClassVar[Mapping[str, str]] = {}  # pattern field -> the field it overrides per module
    foreign: ClassVar[Mapping[str, Any]] = {}  # PEFT's options that afina lacks -> their defaults
    in_memory: ClassVar[frozenset[str]] = frozenset()  # fields that are not written to the file
    beyond_peft: ClassVar[frozenset[str]] = frozenset()  # fields PEFT does not know here; written when they say something

    task_type: str | None = option(None, "what the model is for: SEQ_CLS, CAUSAL_LM, SEQ_2_SEQ_LM, ...")
    auto_mapping: dict[str, Any] | None = option(None, "class of a base model that has no task type")
    peft_version: str | None = option(None, "version of PEFT that wrote the file, when PEFT did")
    base_model_name_or_path: str | None = option(None, "where the base model came from")
    revision: str | None = option(None, "revision of the base model on the hub")
    inference_mode: bool = option(False, "load frozen")

    def __post_init__(self) -> None:
        problems = Problems(type(self).__name__)
        self.check(problems)
        problems.raise_as(ConfigError)

    def check(self, problems: Problems) -> None:
        """Add everything that is wrong; subclasses extend it."""
        if self.task_type is not None:
            known = [t.value for t in TaskType]
            typed = str(getattr(self.task_type, "value", self.task_type))
            if typed not in known:
                problems.add(f"task_type={typed!r} is not a task.{did_you_mean(typed, known)}")
            self.task_type = typed
        check_limits(self, problems)

    def check_file(self, source: str) -> None:
        """Raise ConfigError where the weights of the file `source` that says this cannot be taken up."""

    # --- one mechanism for everything that differs between modules

    def for_module(self, path: str) -> AdapterConfig:
        """This configuration with the values that its patterns give for the module at `path`."""
        changes = {}
        for pattern_field, field in self.overrides.items():
            for pattern, value in (getattr(self, pattern_field) or {}).items():
                if name_matches(pattern, path):
                    changes[field] = value
                    break
        if not changes:
            return self
        changed = dataclasses.replace(self, **changes)
        return changed

    # --- files

    def to_dict(self) -> dict[str, Any]:
        """What is written to `adapter_config.json`."""
        written = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in self.in_memory
            and (f.name not in self.beyond_peft or getattr(self, f.name) not in (None, False, {}, []))
            and (f.name != "peft_version" or self.peft_version is not None)
        }
        written = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in written.items()}
        return {"peft_type": self.peft_type, **written}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Write `adapter_config.json` into a folder."""
        from afina.core.files import write_atomically

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def from_dict(cls: type[C], data: Mapping[str, Any], source: str = "the configuration") -> C:
        """Build from the contents of a file; raises ConfigError with every key that cannot be honoured."""
        known = {f.name for f in dataclasses.fields(cls)} - cls.in_memory
        problems, ignored, values = Problems(source), [], {}
        writer = f"PEFT {data['peft_version']}" if data.get("peft_version") else "the version that wrote the file"
        for key, value in data.items():
            if key == "peft_type":
                continue
            if key in known:
                values[key] = value
            elif key in cls.foreign:
                if value not in (cls.foreign[key], None, False, {}, []):
                    problems.add(f"{key}={value!r} asks for something afina does not do; {writer} knows it")
            elif value in (None, False, {}, [], ""):
                ignored.append(key)
            else:
                problems.add(
                    f"{key}={value!r} is not an option of {cls.__name__}; {writer} knows it."
                    + did_you_mean(key, known | set(cls.foreign))
                )
        problems.raise_as(ConfigError)
        if ignored:
            logger.info("%s: ignored, since they ask for nothing: %s", source, ", ".join(sorted(ignored)))
        return cls(**values)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> AdapterConfig:
        """Read `adapter_config.json` from a folder or the hub; the class is the one its `peft_type` names."""
        path = resolve_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **kwargs)
        assert path is not None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from None
        return config_from_dict(data, str(path))


def config_from_dict(data: Mapping[str, Any], source: str = "the configuration") -> AdapterConfig:
    """The configuration that a file's contents describe, of the class its `peft_type` names."""
    from afina.core.registry import config_class

    if not isinstance(data, Mapping):
        raise ConfigError(f"{source} holds a {type(data).__name__}; expected a table of options")
    if not data.get("peft_type"):
        raise ConfigError(f"{source} has no peft_type, so it does not say which method it configures")
    return config_class(str(data["peft_type"]), source).from_dict(data, source)


@dataclasses.dataclass
class TargetedConfig(AdapterConfig):
    """Options of every method that acts on layers."""

    target_modules: Any = option(
        None, 'layers to adapt: names or ends of names, one regular expression, or "all-linear"; None: the usual ones'
    )
    exclude_modules: Any = option(None, "layers to leave alone: names, ends of names, or one regular expression")
    layers_to_transform: Any = option(None, "numbers of the blocks to adapt; None: all")
    layers_pattern: Any = option(None, "name of the list of blocks, where it is not found by itself")
    modules_to_save: Any = option(None, "modules to train whole and to save with the adapter, such as a new head")
    trainable_token_indices: Any = option(None, "rows of the embedding to train: a list, or {embedding: list}")
    ensure_weight_tying: bool = option(False, "train both sides of tied embeddings as one")
    target_scope: Any = option(None, "only below these modules, for example the language model of a multimodal one")
    autocast_adapter_dtype: bool = option(True, "keep adapter weights in float32 over a 16-bit base")

    in_memory = frozenset({"target_scope", "autocast_adapter_dtype"})
    beyond_peft = frozenset({"layers_to_transform", "layers_pattern", "trainable_token_indices", "ensure_weight_tying"})

    def check(self, problems: Problems) -> None:
        super().check(problems)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "all-linear":
                try:
                    re.compile(value)
                except re.error as error:
                    problems.add(f"{name}={value!r} is not a regular expression: {error}")
            elif value is not None and not isinstance(value, str):
                if isinstance(value, Collection) and all(isinstance(entry, str) for entry in value):
                    setattr(self, name, list(dict.fromkeys(value)))
                else:
                    problems.add(f"{name}={value!r}: expected a list of names, or one regular expression")
        for name in self.overrides:
            if not isinstance(getattr(self, name) or {}, Mapping):
                problems.add(f"{name}={getattr(self, name)!r}: expected a table of names to values")
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            if self.target_modules != "all-linear":
                problems.add(
                    "layers_to_transform works with a list of names; put the numbers into the regular expression of "
                    "target_modules instead"
                )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            problems.add("layers_pattern says where block numbers stand; it needs layers_to_transform")
        for name in ("modules_to_save", "target_scope"):
            value = getattr(self, name)
            if isinstance(value, str):
                problems.add(f"{name}={value!r}: expected a list of module names, such as [{value!r}]")


@dataclasses.dataclass
class PromptConfig(AdapterConfig):
    """Options of every method that puts virtual tokens in front of the input."""

    num_virtual_tokens: int | None = option(None, "number of virtual tokens", low=1)
    token_dim: int | None = option(None, "width of the base model's embeddings; found in the model", low=1)
    num_transformer_submodules: int | None = option(None, "2 where encoder and decoder both get a prompt", low=1, high=2)
    num_attention_heads: int | None = option(None, "key-value heads of the base model; found in the model", low=1)
    num_layers: int | None = option(None, "layers of the base model; found in the model", low=1)
    modules_to_save: Any = option(None, "modules to train whole and to save with the prompt, such as a new head")
    autocast_adapter_dtype: bool = option(True, "keep prompt weights in float32 over a 16-bit base")

    in_memory = frozenset({"autocast_adapter_dtype"})

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.num_virtual_tokens is None:
            problems.add("num_virtual_tokens is missing: how many virtual tokens to train, for example 20")


def changed(config: Any, **changes: Any) -> Any:
    """A copy of a configuration with some values changed, which are not checked again."""
    other = copy.copy(config)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def name_matches(pattern: str, path: str) -> bool:
    """Whether a pattern of `rank_pattern` and the like means this module: a regular expression for the end of its path
    that begins at a name."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def resolve_file(
    source: str | os.PathLike[str], filename: str, *, subfolder: str | None = None, required: bool = True, **kwargs: Any
) -> Path | None:
    """A file in a folder or, where there is no such folder, in a hub repository (`revision`, `token`, `cache_dir`)."""
    if unknown := sorted(kwargs.keys() - HUB_OPTIONS):
        raise ConfigError(
            f"{unknown[0]} is no option of loading.{did_you_mean(unknown[0], HUB_OPTIONS)} "
            f"For the hub there are {', '.join(sorted(HUB_OPTIONS))}"
        )
    folder = Path(source) / subfolder if subfolder else Path(source)
    if folder.is_dir():
        if (folder / filename).is_file():
            return folder / filename
        if not required:
            return None
        here = sorted(p.name for p in folder.iterdir())
        hint = ""
        if "trainer_state.json" in here or "training_args.bin" in here:
            hint = (
                ". It is a checkpoint of transformers' Trainer: resume it with trainer.train(resume_from_checkpoint=...), "
                "and save the adapter with model.save_pretrained(folder)"
            )
        raise CheckpointError(f"{folder} has no {filename}; it holds {', '.join(here[:8]) or 'nothing'}{hint}")
    if Path(source).is_absolute() or str(source).startswith(("./", "../", "~")) or str(source).count("/") > 1:
        raise CheckpointError(f"there is no folder {source}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(str(source), filename, subfolder=subfolder, **kwargs))
    except EntryNotFoundError as error:
        if not required:
            return None
        raise CheckpointError(f"{source} on the hub has no {filename}: {error}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{source} is no folder here and could not be fetched from the hub: {error}") from error
