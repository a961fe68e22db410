"""Prefix tuning: trained keys and values in front of those of every attention layer.

Li and Liang 2021, https://arxiv.org/abs/2101.00190. Cost: n more keys and values a layer. With `prefix_projection` they
come from a small network, which trains more steadily and is left out of the file: only its output is needed afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from afina.core.config import PromptConfig, option
from afina.core.prompts import Prompt
from afina.core.registry import register

__all__ = ["PrefixTuning", "PrefixTuningConfig"]


@dataclass
class PrefixTuningConfig(PromptConfig):
    """Options of prefix tuning."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    prefix_projection: bool = option(False, "make the prefix by a small network")
    encoder_hidden_size: int | None = option(None, "its inner width; the model's own where it is not given", low=1)
    init_weights: str | None = option(None, "'zero' starts with keys and values of zero", choices=(None, "zero"))


@register(
    "prefix_tuning",
    config=PrefixTuningConfig,
    trains="keys and values in front of every attention layer",
    cost="n more keys and values a layer",
    paper="https://arxiv.org/abs/2101.00190",
    num_virtual_tokens=20,
)
class PrefixTuning(Prompt):
    prefix = True

    @staticmethod
    def shape(config: Any) -> tuple[int, int]:
        return config.num_virtual_tokens, config.num_layers * 2 * config.token_dim

    def build(self, config: Any) -> None:
        if not config.prefix_projection:
            super().build(config)
            return
        n, width = self.shape(config)
        inner = config.encoder_hidden_size or config.token_dim
        self.embedding = nn.Embedding(n, config.token_dim)
        self.transform = nn.Sequential(nn.Linear(config.token_dim, inner), nn.Tanh(), nn.Linear(inner, width))

    @torch.no_grad()
    def reset(self, config: PrefixTuningConfig, model: nn.Module) -> None:
        zero = config.init_weights == "zero"
        if "table" in self._parameters:
            self.table.zero_() if zero else self.table.normal_()
        elif zero:
            for parameter in self.transform[-1].parameters():
                parameter.zero_()

    def encode(self) -> torch.Tensor:
        return self.transform(self.embedding.weight)
