"""The factors of an adapter of a pipeline in files of diffusers and of Kohya.

Both are read back and compared bit for bit. The file of diffusers is also loaded by diffusers into a pipeline, which is
asked the golden prompts (T46); Kohya's is asked through diffusers where that reads it (SD 1.x and SDXL), else through afina.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from afina.core.files import write_weights
from afina.diffusion.factors import (
    DIFFUSERS_NAME,
    Factors,
    factors_of_adapter,
    from_diffusers,
    read_factors,
    to_diffusers,
)
from afina.diffusion.kohya import to_kohya
from afina.diffusion.loading import with_factors, with_file
from afina.diffusion.outline import layers_per_block, shapes_of
from afina.diffusion.pipelines import PipelineConfig, load_part, pipeline_config
from afina.errors import CheckpointError, ConfigError
from afina.export.format import Format, Settings, Source
from afina.memory.storage import FLOATS, Storage
from afina.tasks.task import Task

__all__ = ["Diffusers", "Kohya", "convert"]

_ABOUT = "pipeline.json"  # which base the factors are for
_KOHYA_NAME = "kohya.safetensors"


class _LoraFile(Format):
    """What both have in common."""

    merged, pipelines = False, True
    file: str

    def check(self, task: Task, config: Any, settings: Settings) -> None:
        if settings.quantisation != "f16":
            raise ConfigError(f"--quantisation {settings.quantisation}: factors are not quantised; leave it out")

    def write(self, source: Source, folder: Path) -> None:
        factors = factors_of_adapter(source.run / "adapter")
        config: PipelineConfig = source.task.config
        write_file(self.name, factors, config, folder / self.file, source.settings.dtype)
        about = {"base": config.path, "weights": source.settings.stored}
        (folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def load(self, folder: Path, task: Task) -> Any:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        task.storage = Storage(about["weights"])
        model = task.load_model(about["base"])
        return self._into(model, task.config, folder / self.file)

    def _into(self, model: Any, config: PipelineConfig, file: Path) -> Any:
        return with_file(model, config, file)

    def processor(self, folder: Path, kind: str = "tokenizer") -> Any:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        return load_part(pipeline_config(about["base"]), "tokenizer")

    def tolerance(self, folder: Path, settings: Settings) -> float:
        return 1e-4 if settings.stored == "fp32" and settings.dtype in ("auto", "fp32") else 2e-2


class Diffusers(_LoraFile):
    """One file, as `load_lora_weights` reads it."""

    name, title, file = "diffusers", "the factors of a pipeline's adapter, as diffusers loads them", DIFFUSERS_NAME


class Kohya(_LoraFile):
    """One file, as the programs around Kohya's scripts read it."""

    name, title, file = "kohya", "the factors of a pipeline's adapter, as programs of Kohya's form load them", _KOHYA_NAME

    def _into(self, model: Any, config: PipelineConfig, file: Path) -> Any:
        if config.family.name in ("sd", "sdxl"):
            return with_file(model, config, file)
        return with_factors(model, _read(file, config))


def write_file(form: str, factors: dict[str, Factors], config: PipelineConfig, path: Path, dtype: str = "auto") -> None:
    """Write factors in a form and read them back; CheckpointError where they come back otherwise."""
    if dtype != "auto":
        factors = {p: Factors(f.down.to(FLOATS[dtype]), f.up.to(FLOATS[dtype]), f.alpha) for p, f in factors.items()}
    if form == "kohya":
        tensors, metadata = to_kohya(factors, config.family, shapes_of(config), layers_per_block(config))
        write_weights(path, tensors, metadata)
        wanted = factors
    else:
        tensors = to_diffusers(factors)
        write_weights(path, tensors, {})
        wanted = from_diffusers(tensors, factors)
    found = _read(path, config)
    wrong = [p for p in {*wanted, *found} if p not in wanted or p not in found or not _equal(wanted[p], found[p])]
    if wrong:
        raise CheckpointError(f"{path}: read back, {len(wrong)} of {len(wanted)} layers have other factors ({wrong[0]})")


def _equal(a: Factors, b: Factors) -> bool:
    return torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.alpha == b.alpha


def _read(path: Path, config: PipelineConfig) -> dict[str, Factors]:
    return read_factors(path, shapes_of(config), config.family, layers_per_block(config))


def convert(file: Path, form: str, model: str, output: Path) -> int:
    """A file of diffusers or of Kohya, for the pipeline `model`, in another `form`: diffusers, kohya, or adapter for afina's
    own folder. Returns how many layers it adapts."""
    from afina.diffusion.factors import adapter_of

    config = pipeline_config(model)
    factors = _read(file, config)
    if form == "adapter":
        adapter_of(factors, output, model)
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_file(form, factors, config, output / (DIFFUSERS_NAME if form == "diffusers" else _KOHYA_NAME))
    return len(factors)
