"""What a format of export is: how it is written from a merged model, and how its own runtime reads it back.

Every format but the adapter's own begins with the merged model in a folder as transformers reads it, so that no converter
knows of adapters, methods or quantised bases. `load` is the runtime that the artefact is made for; what it returns is called
like a model of transformers, so that a task asks it as it asks the model it was trained with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from afina.core.merge_error import MAX_ERROR
from afina.errors import CheckpointError
from afina.memory.storage import FLOATS
from afina.tasks.task import Task
from afina.training.models import ModelSource, load_processor

__all__ = ["Format", "Settings", "Source", "model_class"]


@dataclass(frozen=True)
class Settings:
    """What was asked for. `max_drop`: how much worse the figure that chose the weights may become; `base`: into which
    weights adapters of a quantised base are merged; `max_error`: of what the adapter does, how much such a merge may lose;
    `dtype`: of a merged model's weights (auto: the checkpoint's own); `quantisation`: of GGUF's weights."""

    max_drop: float = 0.005
    base: str | None = None
    dtype: str = "auto"
    quantisation: str = "f16"
    max_error: float = MAX_ERROR
    stored: str = "fp32"  # how the run's base is stored; not asked for

    @property
    def quantised(self) -> bool:
        """Whether the run's base is stored in fewer than 16 bits, so that a merge in floating point is another model."""
        return self.stored not in FLOATS


@dataclass
class Source:
    """What a format is made from: the merged model in `folder`, the run it came from, its task."""

    folder: Path
    run: Path
    task: Task
    settings: Settings
    notes: list[str] = field(default_factory=list)  # what is to be told of the export, as sentences for a person


class Format(ABC):
    """One format."""

    name: ClassVar[str]
    title: ClassVar[str]  # what it is for, in a line
    merged: ClassVar[bool] = True  # whether it is made from the merged model
    pipelines: ClassVar[bool] = False  # whether it is of a pipeline of diffusers
    lossy: ClassVar[bool] = False  # see `rounds`
    timed: ClassVar[bool] = False  # whether `load` is as fast as it is meant to be, so that a measured speed says something

    def rounds(self, settings: Settings) -> bool:
        """Whether weights are rounded so far that figures are measured and continuations may differ."""
        return self.lossy

    def check(self, task: Task, config: Any, settings: Settings) -> None:  # noqa: B027 (some hold whatever was loaded)
        """Raise ConfigError where this format cannot hold such a model, saying what can be done instead."""

    @abstractmethod
    def write(self, source: Source, folder: Path) -> None:
        """Make the artefact in `folder`, which exists and is empty."""

    @abstractmethod
    def load(self, folder: Path, task: Task) -> Any:
        """The artefact in its own runtime, called as a model of transformers is. Raises CheckpointError for a broken one."""

    def processor(self, folder: Path, kind: str = "tokenizer") -> Any:
        """What makes the model's input, as it lies inside the artefact; see `Task.processor_kind`."""
        name = str(folder)
        return load_processor(ModelSource(name, name, name), kind, folder)

    def config(self, folder: Path) -> Any:
        """The configuration of the model inside the artefact; None where the format has its own."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None

    def stops(self, model: Any) -> list[int]:
        """Tokens at which the artefact stops by its own settings."""
        own = model.generation_config.eos_token_id
        return sorted(own if isinstance(own, list) else [own] if own is not None else [])

    def tolerance(self, folder: Path, settings: Settings) -> float:
        """How far its probabilities may be from those of the run: the largest difference, or where weights are rounded
        (`rounds`) the mean one."""
        return 1e-4

    def cure(self) -> str:
        """What may help where rounding takes more than the tolerance; nothing where nothing is known."""
        return ""

    def weights(self, folder: Path) -> int:
        """Bytes of the artefact, but for what is only told about it."""
        told = ("golden", "golden.json", "export.json", "README.md")
        paths = (p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] not in told)
        return sum(path.stat().st_size for path in paths)


def model_class(folder: Path) -> Any:
    """The class of transformers that a folder's configuration names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    if not names:
        raise CheckpointError(f"{folder}: its config.json names no model class of transformers ({config.architectures})")
    return getattr(transformers, names[0])
