"""The kinds of pipelines that are trained: what their parts are called, how a prompt becomes what the model is given, and
how the model is asked.

A prompt is encoded by the pipeline's own `encode_prompt`, so that training reads what generating reads. Two ways of making
noise are known: steps of a diffusion (Ho et al., https://arxiv.org/abs/2006.11239; the model tells the noise or the
velocity) and the straight line of a flow (Esser et al., https://arxiv.org/abs/2403.03206; the model tells its direction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from afina.errors import ConfigError, did_you_mean

__all__ = ["FAMILIES", "Condition", "Family", "family_of"]

Condition = dict[str, torch.Tensor]  # what the model is given beside the noisy latents, a row each


@dataclass(frozen=True)
class Family:
    """One kind of pipeline. `clip` are the text encoders that may be trained: those whose adapters diffusers loads."""

    name: ClassVar[str]
    pipeline: ClassVar[str]  # class of diffusers
    core: ClassVar[str] = "transformer"  # component that is trained
    core_class: ClassVar[str]
    text_encoders: ClassVar[tuple[str, ...]]
    clip: ClassVar[tuple[str, ...]]
    flow: ClassVar[bool] = True
    tokens: ClassVar[int] = 77  # of a prompt, unless told otherwise
    patch: ClassVar[int] = 1  # latents that stand together, each way
    guided: ClassVar[bool] = True  # whether it is asked without the prompt too when pictures are made

    def condition(self, pipeline: Any, prompts: Sequence[str], device: Any, tokens: int) -> Condition:
        """What the text encoders of a pipeline make of prompts; those that take any length read `tokens`."""
        raise NotImplementedError

    def ask(
        self, core: Any, noisy: torch.Tensor, times: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """What the model says of noisy latents `[rows, channels, height, width]` at times `[rows]`."""
        raise NotImplementedError

    def arguments(self, condition: Condition, empty: Condition | None) -> dict[str, Any]:
        """How a pipeline is called with prompts that are encoded already; `empty` is the prompt ""."""
        made = {key: condition[key] for key in ("prompt_embeds", "pooled_prompt_embeds") if key in condition}
        return made | ({f"negative_{key}": empty[key] for key in made} if empty is not None else {})


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    name, pipeline, core, core_class = "sd", "StableDiffusionPipeline", "unet", "UNet2DConditionModel"
    text_encoders = clip = ("text_encoder",)
    flow = False

    def condition(self, pipeline: Any, prompts: Sequence[str], device: Any, tokens: int) -> Condition:
        made, _ = pipeline.encode_prompt(list(prompts), device, 1, False)
        return {"prompt_embeds": made}

    def ask(
        self, core: Any, noisy: torch.Tensor, times: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        made: torch.Tensor = core(noisy, times, encoder_hidden_states=condition["prompt_embeds"], return_dict=False)[0]
        return made


class StableDiffusionXL(Family):
    """Stable Diffusion XL: two text encoders, and the size of the picture as it was and as it was cut."""

    name, pipeline, core, core_class = "sdxl", "StableDiffusionXLPipeline", "unet", "UNet2DConditionModel"
    text_encoders = clip = ("text_encoder", "text_encoder_2")
    flow = False

    def condition(self, pipeline: Any, prompts: Sequence[str], device: Any, tokens: int) -> Condition:
        made, _, pooled, _ = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return {"prompt_embeds": made, "pooled_prompt_embeds": pooled}

    def ask(
        self, core: Any, noisy: torch.Tensor, times: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        added = {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": condition["sizes"].to(noisy.dtype)}
        made: torch.Tensor = core(
            noisy, times, encoder_hidden_states=condition["prompt_embeds"], added_cond_kwargs=added, return_dict=False
        )[0]
        return made


class StableDiffusion3(Family):
    """Stable Diffusion 3.x: a transformer over latents and text, two CLIP encoders and T5."""

    name, pipeline, core_class = "sd3", "StableDiffusion3Pipeline", "SD3Transformer2DModel"
    text_encoders, clip = ("text_encoder", "text_encoder_2", "text_encoder_3"), ("text_encoder", "text_encoder_2")
    tokens, patch = 256, 2

    def condition(self, pipeline: Any, prompts: Sequence[str], device: Any, tokens: int) -> Condition:
        made, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=tokens
        )
        return {"prompt_embeds": made, "pooled_prompt_embeds": pooled}

    def ask(
        self, core: Any, noisy: torch.Tensor, times: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        made: torch.Tensor = core(
            hidden_states=noisy, timestep=times, encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"], return_dict=False,
        )[0]  # fmt: skip
        return made


class Flux(Family):
    """Flux: a transformer over squares of two by two latents, CLIP's summary of the prompt and T5's tokens."""

    name, pipeline, core_class = "flux", "FluxPipeline", "FluxTransformer2DModel"
    text_encoders, clip = ("text_encoder", "text_encoder_2"), ("text_encoder",)
    tokens, patch, guided = 512, 2, False

    def condition(self, pipeline: Any, prompts: Sequence[str], device: Any, tokens: int) -> Condition:
        made, pooled, _ = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=tokens)
        return {"prompt_embeds": made, "pooled_prompt_embeds": pooled}

    def ask(
        self, core: Any, noisy: torch.Tensor, times: torch.Tensor, condition: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        rows, channels, height, width = noisy.shape
        text = condition["prompt_embeds"]
        squares = noisy.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(height // 2, width // 2, 3, device=noisy.device, dtype=noisy.dtype)
        places[..., 1] = torch.arange(height // 2, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(width // 2, device=noisy.device)[None, :]
        guidance = torch.ones(rows, device=noisy.device) if core.config.guidance_embeds else None
        made = core(
            hidden_states=squares.reshape(rows, -1, channels * 4), timestep=times / 1000, guidance=guidance,
            pooled_projections=condition["pooled_prompt_embeds"], encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=noisy.dtype), img_ids=places.view(-1, 3),
            return_dict=False,
        )[0]  # fmt: skip
        made = made.view(rows, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return made.reshape(rows, channels, height, width)  # type: ignore[no-any-return]


FAMILIES: dict[str, Family] = {f.pipeline: f for f in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Flux())}


def family_of(pipeline: str, where: str) -> Family:
    """The family of a pipeline class; raises ConfigError naming `where` it was asked for."""
    if pipeline not in FAMILIES:
        known = ", ".join(f"{f.pipeline}" for f in FAMILIES.values())
        near = did_you_mean(pipeline, FAMILIES)
        raise ConfigError(f"{where} is a {pipeline}, which afina does not train.{near} It trains {known}")
    return FAMILIES[pipeline]
