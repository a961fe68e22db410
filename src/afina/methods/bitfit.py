"""BitFit: train the biases alone. y = base(x) + (b' - b), which a plain layer computes by itself when it holds b'.

Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199. Cost: none on plain layers, else one addition; kept for
backward: nothing.
The trained bias is the adapter's own, so that switching the adapter off gives back the base exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from afina.core.adapter import Adapter, Base, Placement, Weights, cast
from afina.core.config import TargetedConfig
from afina.core.layers import view_of
from afina.core.registry import register
from afina.core.targets import ModuleMap
from afina.errors import TargetError

__all__ = ["Bias", "BitFitConfig"]


@dataclass
class BitFitConfig(TargetedConfig):
    """Options of BitFit: which layers' biases to train; all of them by default."""

    peft_type: ClassVar[str] = "BITFIT"


@register(
    "bitfit",
    config=BitFitConfig,
    trains="every bias",
    cost="none, or 1 addition a quantised layer; none when merged",
    paper="https://arxiv.org/abs/2106.10199",
)
class Bias(Adapter):
    kinds = frozenset({"linear", "conv", "norm"})

    def build(self, config: Any) -> None:
        bias = self.view.bias()
        if bias is None:
            raise TargetError(f"a {type(self.view.layer).__name__} without a bias cannot have its bias trained")
        self.parameter("bias", bias.shape)

    @torch.no_grad()
    def reset(self, config: Any) -> None:
        self.bias.copy_(self.view.bias())

    def forward(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        view, bias = self.view, self.whole_bias()
        if base.is_layer and bias is not None:
            own: Any = view.bias()
            return view.holding(bias=cast(bias, own))(x, *base.args, **base.kwargs)  # type: ignore[arg-type]
        y = base(x)
        return y + view.per_feature(self.change().to(y.dtype), y)

    def whole_bias(self) -> torch.Tensor | None:
        """The trained bias, where the layer can compute with it."""
        return self._parameters["bias"] if self.view.holds_floats and self.view.before_merge is None else None

    def change(self) -> torch.Tensor:
        """What the trained bias adds to the layer's own."""
        return self.bias - self.view.own_bias()

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
        assert bias is not None
        return weight, bias + self.change().to(bias.dtype)

    def values_kept(self, rows: int) -> int:
        return 0

    @staticmethod
    def fits(modules: ModuleMap, path: str) -> bool:
        """Whether the module at `path` has a bias this method can train."""
        module = modules.modules[path]
        return module._parameters.get("bias") is not None and view_of(module).kind in Bias.kinds

    @classmethod
    def everywhere(cls, modules: ModuleMap, config: Any) -> list[Placement]:
        """Every bias outside the modules that are trained whole."""
        saved = tuple(f"{s}." for s in config.modules_to_save or ())
        names = [n for n in modules.modules if cls.fits(modules, n)]
        heads = set(config.modules_to_save or ())
        return [Placement(n, cls) for n in names if n not in heads and not n.startswith(saved)]

    @classmethod
    def default_targets(cls, modules: ModuleMap) -> list[str]:
        names = [n for n in modules.modules if cls.fits(modules, n)]
        if not names:
            raise TargetError(
                f"{type(modules.model).__name__} has no biases, so BitFit has nothing to train; use LoRA or (IA)3"
            )
        return names
