"""A pipeline in a folder of diffusers: what it says of itself, and loading its parts one by one.

Parts are loaded by themselves, since training needs few of them at a time: the text encoders and the encoder of pictures
are let go once prompts and pictures are encoded. Each part comes from its configuration alone where the storage is empty.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from afina.diffusion.families import Family, family_of
from afina.errors import ConfigError, MissingDependencyError, shortened
from afina.memory.storage import FLOATS, Storage

__all__ = [
    "INDEX",
    "PipelineConfig",
    "check_diffusers",
    "load_part",
    "make_pipeline",
    "pipeline_class",
    "pipeline_config",
    "pipeline_folder",
    "quietly",
]

INDEX = "model_index.json"
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class PipelineConfig:
    """What a pipeline says of itself; in the place of a model's configuration."""

    path: str
    family: Family
    parts: dict[str, tuple[str, str]]  # library and class of each component
    settings: dict[str, Any] = field(default_factory=dict)  # of the index, beside the components
    dtype: torch.dtype = torch.float32  # of the core's weights
    tokens: int = 77  # of a prompt

    is_encoder_decoder = False

    @property
    def model_type(self) -> str:
        """Name of the family."""
        return self.family.name

    @property
    def _name_or_path(self) -> str:
        return self.path

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"model_type": self.model_type, "parts": self.parts, **self.settings}


def check_diffusers(what: str) -> None:
    """Raise MissingDependencyError where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise MissingDependencyError("diffusers", "diffusion", what)


def pipeline_folder(path: str) -> Path:
    """The folder of a pipeline: itself, or what the hub has under that name, fetched. Raises ConfigError."""
    folder = Path(path)
    return folder if folder.is_dir() else _fetched(path)


@cache
def _fetched(path: str) -> Path:
    check_diffusers(f"the pipeline {path!r}")
    try:
        return Path(_library("diffusers").DiffusionPipeline.download(path))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model {path!r} could not be loaded: {reason}\nIt is no folder here, so the hub was asked"
        ) from error


def pipeline_config(path: str) -> PipelineConfig:
    """What the index of a pipeline says. Raises ConfigError where it is none, broken, or of a family that is not trained."""
    folder = pipeline_folder(path)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        name = str(index["_class_name"])
    except FileNotFoundError:
        here = shortened(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ConfigError(f"model {path!r} is no pipeline of diffusers: it has no {INDEX}; it holds {here}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model {path!r}: {INDEX} is broken: {error}") from None
    family = family_of(name, f"model {path!r}")
    parts = {key: (value[0], value[1]) for key, value in index.items() if isinstance(value, list) and value[0] is not None}
    needed = [family.core, "vae", "scheduler", "tokenizer", *family.clip]
    lacking = [part for part in needed if part not in parts or not (folder / part).is_dir()]
    if lacking:
        raise ConfigError(f"model {path!r}: the {name} lacks {', '.join(lacking)}")
    settings = {key: value for key, value in index.items() if not isinstance(value, list) and not key.startswith("_")}
    return PipelineConfig(path, family, parts, settings, _stored_type(folder / family.core), family.tokens)


def _stored_type(folder: Path) -> torch.dtype:
    """Type of the weights in a folder, from the header of a file of them; float32 where there are none."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        found = [entry["dtype"] for key, entry in header.items() if key != "__metadata__"]
        if found:
            return _TYPES.get(found[0], torch.float32)
    return torch.float32


def load_part(config: PipelineConfig, part: str, storage: Storage = Storage()) -> Any:  # noqa: B008 (it is frozen)
    """One component: a model in the storage's type, a tokenizer or a scheduler. ConfigError where it cannot be read."""
    check_diffusers(f"the pipeline {config.path!r}")
    folder = pipeline_folder(config.path)
    library, name = config.parts[part]
    cls = getattr(_library(library), name)
    if "scheduler" in part or "tokenizer" in part:
        return cls.from_pretrained(folder / part)
    if storage.weights not in FLOATS:
        raise ConfigError(
            f"memory.weights={storage.weights}: the weights of a pipeline are stored as fp32, bf16 or fp16; take bf16 "
            "(or fp16 on a GPU that has no bf16) and memory.gradient_checkpointing=true"
        )
    with quietly():
        if storage.empty:
            with torch.device("meta"):
                if library == "diffusers":
                    return cls.from_config(cls.load_config(folder / part)).to(storage.dtype)
                return cls(cls.config_class.from_pretrained(folder / part)).to(storage.dtype)
        files = {"variant": variant} if (variant := _variant(folder / part)) else {}
        kind = "torch_dtype" if library == "diffusers" else "dtype"
        try:
            model, info = cls.from_pretrained(folder / part, output_loading_info=True, **{kind: storage.dtype}, **files)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"model {config.path!r}: its {part} cannot be loaded: {str(error).splitlines()[0]}") from error
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ConfigError(f"model {config.path!r}: the checkpoint of its {part} lacks {shortened(wrong)}")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # as transformers marks what it has loaded; nothing here is new
    return model


def _variant(folder: Path) -> str | None:
    """`fp16` where a folder holds weights of that name alone."""
    names = [p.name for p in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def make_pipeline(config: PipelineConfig, **parts: Any) -> Any:
    """The pipeline of some components that are there; the others are None, but for tokenizers and the scheduler."""
    cls = pipeline_class(config.family)
    components, options = cls._get_signature_keys(cls)
    made: dict[str, Any] = dict.fromkeys(components)
    for part in config.parts:
        if part == "scheduler" or part.startswith("tokenizer"):
            made[part] = load_part(config, part, Storage())
    made |= parts
    made |= {option: False for option in ("requires_safety_checker", "add_watermarker") if option in options}
    if "force_zeros_for_empty_prompt" in config.settings:
        made["force_zeros_for_empty_prompt"] = config.settings["force_zeros_for_empty_prompt"]
    with quietly():
        pipeline = cls(**made)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_class(family: Family) -> Any:
    """The class of diffusers."""
    return getattr(_library("diffusers"), family.pipeline)


def _library(name: str) -> Any:
    with quietly():
        return importlib.import_module("diffusers" if name == "diffusers" else "transformers")


@contextmanager
def quietly() -> Iterator[None]:
    """diffusers tells of every part and every kernel that is not there, and transformers of every weight that it renames."""
    names = ("diffusers", "transformers", "torchao", "torch.utils._pytree", "bitsandbytes")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
