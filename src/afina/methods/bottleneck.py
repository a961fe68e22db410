"""Bottleneck adapters: a small network of two layers with a nonlinearity, put in after or beside a layer.

    houlsby   after the attention and after the feed-forward layer: h + up(act(down(h))), h = base(x)
              Houlsby et al. 2019, https://arxiv.org/abs/1902.00751
    pfeiffer  after the feed-forward layer alone; Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052
    parallel  beside the feed-forward layer: base(x) + scaling * up(act(down(x)))
              He et al. 2022, https://arxiv.org/abs/2110.04366

"After a layer" is after its last projection, before dropout, residual and norm. Cost: two thin products a place, before
and after training (it cannot be merged); kept for backward: the input of `down` and the inner activation twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from afina.core.adapter import Adapter, Base, Placement, cast, drop
from afina.core.config import TargetedConfig, option
from afina.core.registry import register
from afina.core.targets import ModuleMap
from afina.errors import Problems

__all__ = ["Bottleneck", "BottleneckConfig"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@dataclass
class BottleneckConfig(TargetedConfig):
    """Options of bottleneck adapters."""

    peft_type: ClassVar[str] = "BOTTLENECK"

    placement: str = option("houlsby", "where the network goes", choices=("houlsby", "pfeiffer", "parallel"))
    reduction_factor: float = option(16, "the layer's width over the inner width", low=1)
    bottleneck_size: int | None = option(None, "inner width, instead of reduction_factor", low=1)
    activation: str = option("relu", "nonlinearity between the two layers", choices=tuple(ACTIVATIONS))
    scaling: float = option(1.0, "factor of what is added")
    dropout: float = option(0.0, "dropout on the input of the first layer", low=0.0, high=1.0)
    init_weights: bool = option(True, "start as the base: second layer zero; False: random")

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.scaling == 0:
            problems.add("scaling=0: what is added would stay zero and nothing would be learned")


@register(
    "bottleneck",
    config=BottleneckConfig,
    trains="a small two-layer network after or beside each sublayer",
    cost="2 thin products a place, also in use: it cannot be merged",
    paper="https://arxiv.org/abs/1902.00751",
)
class Bottleneck(Adapter):
    kinds = frozenset({"linear"})
    mergeable = False

    def build(self, config: BottleneckConfig) -> None:
        self.parallel, self.scaling, self.p = config.placement == "parallel", config.scaling, config.dropout
        self.activation = config.activation
        outer = self.view.in_features if self.parallel else self.view.out_features
        inner = config.bottleneck_size or max(1, round(self.view.out_features / config.reduction_factor))
        self.parameter("down_weight", (inner, outer))
        self.parameter("down_bias", (inner,))
        self.parameter("up_weight", (self.view.out_features, inner))
        self.parameter("up_bias", (self.view.out_features,))

    @torch.no_grad()
    def reset(self, config: BottleneckConfig) -> None:
        for weight in (self.down_weight, self.up_weight):
            weight.uniform_(-1, 1).mul_(weight.shape[1] ** -0.5)
        if config.init_weights:
            self.up_weight.zero_()
        self.down_bias.zero_()
        self.up_bias.zero_()

    def forward(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        y = base(x)
        h = drop(x if self.parallel else y, self.p, self.training)
        z = ACTIVATIONS[self.activation](F.linear(h, cast(self.down_weight, h), cast(self.down_bias, h)))
        added = F.linear(z, cast(self.up_weight, h), cast(self.up_bias, h))
        return y + (added * self.scaling).to(y.dtype)

    def values_kept(self, rows: int) -> int:
        inner = self.down_bias.shape[0]
        return rows * (self.down_weight.shape[1] + 3 * inner)

    @classmethod
    def placements(cls, modules: ModuleMap, config: Any, *, strict: bool) -> list[Placement]:
        roles = ("attention_out", "ff_down") if config.placement == "houlsby" else ("ff_down",)
        paths = modules.select(config, lambda m: m.roles(*roles) or m.role("linear"), strict=strict)
        return [Placement(path, cls) for path in paths]
