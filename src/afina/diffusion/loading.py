"""An adapter from a file put into the parts of a pipeline: by diffusers, or by adding factors to the weights."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from afina.diffusion.factors import Factors
from afina.diffusion.pipelines import PipelineConfig, make_pipeline, quietly
from afina.errors import MissingDependencyError

__all__ = ["with_factors", "with_file"]


def with_file(model: Any, config: PipelineConfig, file: Path) -> Any:
    """The parts of a denoiser, with a file that diffusers has loaded into them. It needs PEFT for that."""
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("peft", "diffusion", "loading an adapter into diffusers")
    parts = {name: getattr(model, name) for name in (config.family.core, *model.texts)}
    with quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = make_pipeline(config, **parts)
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return model.eval()


@torch.no_grad()
def with_factors(model: Any, factors: Mapping[str, Factors]) -> Any:
    """The model with what the factors stand for added to its weights."""
    for path, own in factors.items():
        weight = model.get_submodule(path).weight
        added = (own.up.flatten(1).double() @ own.down.flatten(1).double()) * (own.alpha / own.rank)
        weight += added.view(weight.shape).to(weight)
    return model.eval()
