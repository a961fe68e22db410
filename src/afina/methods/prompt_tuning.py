"""Prompt tuning: trained embeddings of virtual tokens in front of the input.

Lester et al. 2021, https://arxiv.org/abs/2104.08691. Cost: a longer input. The virtual tokens start as random vectors, as
the embeddings of a text that describes the task, or as those of tokens drawn from the vocabulary.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from afina.core.config import PromptConfig, option
from afina.core.prompts import Prompt
from afina.core.registry import register
from afina.errors import Problems

__all__ = ["PromptTuning", "PromptTuningConfig", "PromptTuningInit"]


class PromptTuningInit(str, enum.Enum):
    """How virtual tokens start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptConfig):
    """Options of prompt tuning."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    prompt_tuning_init: str = option("RANDOM", "how virtual tokens start", choices=[i.value for i in PromptTuningInit])
    prompt_tuning_init_text: str | None = option(None, "the text to start from, with prompt_tuning_init='TEXT'")
    tokenizer_name_or_path: str | None = option(None, "the tokenizer that splits that text")
    tokenizer_kwargs: dict[str, Any] | None = option(None, "options for loading the tokenizer")

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    problems.add(f"prompt_tuning_init='TEXT' needs {name}")
        elif self.tokenizer_kwargs:
            problems.add("tokenizer_kwargs is used with prompt_tuning_init='TEXT' alone")


@register(
    "prompt_tuning",
    config=PromptTuningConfig,
    trains="embeddings of virtual tokens",
    cost="a longer input",
    paper="https://arxiv.org/abs/2104.08691",
    num_virtual_tokens=20,
)
class PromptTuning(Prompt):
    @torch.no_grad()
    def reset(self, config: PromptTuningConfig, model: nn.Module) -> None:
        self.table.normal_()
        rows, table = len(self.table), model.get_input_embeddings().weight  # type: ignore[operator]
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            self.table.copy_(table[torch.randint(0, len(table), (rows,))])
        elif config.prompt_tuning_init == "TEXT":
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **config.tokenizer_kwargs or {})
            ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
            ids = (ids * -(-rows // len(ids)))[:rows]  # repeated until it is long enough
            self.table.copy_(table[torch.tensor(ids, device=table.device)])
