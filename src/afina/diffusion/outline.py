"""The layers of a pipeline, known from its configurations alone."""

from __future__ import annotations

import json

from afina.diffusion.denoiser import Denoiser
from afina.diffusion.pipelines import PipelineConfig, pipeline_folder
from afina.memory.storage import Storage

__all__ = ["layers_per_block", "shapes_of"]


def shapes_of(config: PipelineConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of its core and its text encoders, by the path of their layer."""
    model = Denoiser.load(config, config.family.text_encoders, Storage("fp32", empty=True))
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name: tuple(weight.shape) for name, weight in weights.items() if weight is not None and weight.dim() > 1}


def layers_per_block(config: PipelineConfig) -> int:
    """Of a UNet; 0 where there is none."""
    file = pipeline_folder(config.path) / config.family.core / "config.json"
    return int(json.loads(file.read_text(encoding="utf-8")).get("layers_per_block", 0))
