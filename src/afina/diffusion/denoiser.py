"""What is trained of a pipeline, as one module: `Denoiser`.

Its parts hang in it under the names they have in the pipeline (`unet` or `transformer`, `text_encoder`, ...), so that the
keys of an adapter are those that diffusers knows, and every method of the core works on it as on any module. It holds the
text encoders where they are trained, and the encoder of pictures where pictures are encoded anew in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from afina.diffusion.families import Condition
from afina.diffusion.pipelines import PipelineConfig, load_part, make_pipeline
from afina.errors import ConfigError
from afina.memory.storage import Storage

__all__ = ["Denoiser"]


class Denoiser(nn.Module):
    """The core of a pipeline, with the `others` of its parts that a step of training needs."""

    supports_gradient_checkpointing = True
    base_model_prefix = ""
    main_input_name = "noisy"

    def __init__(self, config: PipelineConfig, core: nn.Module, others: Mapping[str, nn.Module]):
        super().__init__()
        self.config: Any = config
        self.add_module(config.family.core, core)
        for name, part in others.items():
            self.add_module(name, part)
        texts = {name: part for name, part in others.items() if name in config.family.text_encoders}
        self.__dict__["pipeline"] = make_pipeline(config, **texts) if texts else None  # no module, and no part of its own

    @classmethod
    def load(cls, config: PipelineConfig, others: Sequence[str], storage: Storage) -> Denoiser:
        """Each part in the storage; the encoder of pictures in float32, since narrower types overflow in some."""
        core = load_part(config, config.family.core, storage)
        parts = {}
        for name in others:
            own = Storage("fp32", empty=storage.empty) if name == "vae" else storage
            if name in config.parts:
                parts[name] = load_part(config, name, own)
        return cls(config, core, parts)

    @property
    def core(self) -> Any:
        """The UNet or the transformer."""
        return getattr(self, self.config.family.core)

    @property
    def texts(self) -> list[str]:
        """Text encoders that are here."""
        return [name for name in self.config.family.text_encoders if name in self._modules]

    def forward(
        self, noisy: torch.Tensor, times: torch.Tensor, condition: Mapping[str, torch.Tensor], prompts: Sequence[str] = ()
    ) -> torch.Tensor:
        """What the model says of noisy latents `[rows, channels, height, width]` at times `[rows]`; with `prompts` the text
        encoders are asked first."""
        if prompts:
            condition = {**condition, **self.encode(prompts, noisy.device)}
        kind = self.core.dtype
        condition = {key: value.to(kind) for key, value in condition.items()}
        return self.config.family.ask(self.core, noisy.to(kind), times, condition).float()  # type: ignore[no-any-return]

    def encode(self, prompts: Sequence[str], device: Any) -> Condition:
        """What its text encoders make of prompts."""
        return self.config.family.condition(self.pipeline, prompts, device, self.config.tokens)  # type: ignore[no-any-return]

    # --- what a model of transformers has

    def get_input_embeddings(self) -> None:
        """There is no table of tokens."""

    def get_output_embeddings(self) -> None:
        """There is none either."""

    def activation_checkpointing_enable(self, settings: Mapping[str, Any]) -> None:
        """Blocks keep their input alone, in every part."""
        core: Any = self.core
        if not core._supports_gradient_checkpointing:
            raise ConfigError(f"memory.gradient_checkpointing: {type(core).__name__} cannot compute its blocks again")
        core.enable_gradient_checkpointing()
        for name in self.texts:
            part: Any = getattr(self, name)
            part.gradient_checkpointing_enable(settings)

    def disable_input_require_grads(self) -> None:
        """Nothing asks for them."""
