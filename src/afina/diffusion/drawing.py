"""Pictures made by a pipeline whose prompts are encoded already."""

from __future__ import annotations

from typing import Any

import torch

from afina.diffusion.families import Condition
from afina.diffusion.pipelines import PipelineConfig, make_pipeline, quietly

__all__ = ["draw", "without_prompt"]


def without_prompt(config: PipelineConfig, condition: Condition, empty: Condition) -> Condition | None:
    """What the model is given where it is asked without the prompt; None where it never is."""
    if not config.family.guided:
        return None
    if config.settings.get("force_zeros_for_empty_prompt", config.family.name == "sdxl"):
        return {key: torch.zeros_like(value) for key, value in condition.items()}
    return empty


@torch.no_grad()
def draw(
    config: PipelineConfig, core: Any, vae: Any, condition: Condition, empty: Condition | None, *,
    seeds: list[int], steps: int, size: int,
) -> list[Any]:  # fmt: skip
    """One picture for each seed, `size` pixels square: the same seed draws the same beginning, whatever the batch."""
    core.eval()
    with quietly():
        pipeline = make_pipeline(config, vae=vae, **{config.family.core: core})
        made = []
        for seed in seeds:
            given = {
                key: value.to(core.device, core.dtype) for key, value in config.family.arguments(condition, empty).items()
            }
            chance = torch.Generator().manual_seed(seed)
            made += pipeline(**given, num_inference_steps=steps, height=size, width=size, generator=chance).images
    return made
