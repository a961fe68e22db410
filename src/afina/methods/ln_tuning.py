"""LayerNorm tuning: train the weights and biases of the normalisation layers.

Zhao et al. 2023, https://arxiv.org/abs/2312.11420. The trained norm stands in for the layer's own. Cost: none; kept for
backward: what the norm itself keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from afina.core.adapter import Replacement
from afina.core.config import TargetedConfig
from afina.core.registry import register
from afina.core.targets import ModuleMap

__all__ = ["LNTuningConfig", "LayerNormTuning"]


@dataclass
class LNTuningConfig(TargetedConfig):
    """Options of LayerNorm tuning: which norms; all of them by default."""

    peft_type: ClassVar[str] = "LN_TUNING"


@register(
    "ln_tuning",
    config=LNTuningConfig,
    trains="weight and bias of every norm",
    cost="none",
    paper="https://arxiv.org/abs/2312.11420",
)
class LayerNormTuning(Replacement):
    kinds = frozenset({"norm", "linear", "conv", "embedding"})
    checkpoint_keys: dict[str, str] = {
        "weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias",
    }  # fmt: skip

    @classmethod
    def default_targets(cls, modules: ModuleMap) -> list[str]:
        return modules.role("norm")
