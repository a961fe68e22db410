"""P-tuning: embeddings of virtual tokens made by a small network, in front of the input.

Liu et al. 2021, https://arxiv.org/abs/2103.10385. Cost: a longer input. The network (three linear layers, or a
bidirectional LSTM and two) helps training alone: what is stored for use is its output.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from afina.core.config import PromptConfig, option
from afina.core.prompts import Prompt
from afina.core.registry import register

__all__ = ["PTuning", "PromptEncoderConfig", "PromptEncoderReparameterizationType"]


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that makes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptConfig):
    """Options of P-tuning."""

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: str = option("MLP", "the network", choices=("MLP", "LSTM"))
    encoder_hidden_size: int | None = option(None, "its inner width; the model's own where it is not given", low=1)
    encoder_num_layers: int = option(2, "layers of the LSTM", low=1)
    encoder_dropout: float = option(0.0, "dropout between the layers of the LSTM", low=0.0, high=1.0)


@register(
    "p_tuning",
    config=PromptEncoderConfig,
    trains="a network that makes embeddings of virtual tokens",
    cost="a longer input",
    paper="https://arxiv.org/abs/2103.10385",
    num_virtual_tokens=20,
)
class PTuning(Prompt):
    def build(self, config: PromptEncoderConfig) -> None:
        rows, width = self.shape(config)
        inner = config.encoder_hidden_size or width
        self.embedding = nn.Embedding(rows, width)
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm = nn.LSTM(
                width, inner, config.encoder_num_layers, dropout=config.encoder_dropout, bidirectional=True, batch_first=True
            )
            self.head = nn.Sequential(nn.Linear(2 * inner, 2 * inner), nn.ReLU(), nn.Linear(2 * inner, width))
        else:
            self.head = nn.Sequential(
                nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width)
            )

    def encode(self) -> torch.Tensor:
        rows = self.embedding.weight
        if hasattr(self, "lstm"):
            rows = self.lstm(rows.unsqueeze(0))[0].squeeze(0)
        return self.head(rows)
