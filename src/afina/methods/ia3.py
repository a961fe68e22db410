"""(IA)3: three learned vectors a block that scale keys, values and the inside of the feed-forward layer.

Liu et al. 2022, https://arxiv.org/abs/2205.05638. y = l * base(x), or base(l * x) for feed-forward layers, whose input is
the inner activation. Cost: one product a layer; kept for backward: the tensor that is scaled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from afina.core.adapter import Placement, Scale
from afina.core.config import TargetedConfig, option
from afina.core.registry import register
from afina.core.targets import ModuleMap, compact_names, matches_any
from afina.errors import Problems

__all__ = ["IA3", "IA3Config"]


@dataclass
class IA3Config(TargetedConfig):
    """Options of (IA)3."""

    peft_type: ClassVar[str] = "IA3"

    feedforward_modules: Any = option(None, "of the targets, those whose input is scaled rather than their output")
    fan_in_fan_out: bool = option(False, "in PEFT's files; afina sees for itself how a layer stores its weight")
    init_ia3_weights: bool = option(True, "start at one, as the base; False: random")

    def check(self, problems: Problems) -> None:
        super().check(problems)
        ff, target = self.feedforward_modules, self.target_modules
        if isinstance(ff, Iterable) and not isinstance(ff, str):
            self.feedforward_modules = ff = list(dict.fromkeys(ff))
            if isinstance(target, list) and (extra := [name for name in ff if not matches_any(target, name)]):
                problems.add(f"feedforward_modules has {extra}, which target_modules={target} does not name")
        if target is not None and ff is None:
            problems.add("feedforward_modules is missing: which of target_modules are feed-forward layers ([] for none)")


@register(
    "ia3",
    config=IA3Config,
    trains="a scale for each key, value and inner feed-forward activation",
    cost="1 product a layer; none when merged",
    paper="https://arxiv.org/abs/2205.05638",
)
class IA3(Scale):
    kinds = frozenset({"linear", "conv"})

    def build(self, config: IA3Config) -> None:
        view, self.feedforward = self.view, config.feedforward_modules == "this"
        ones = [1] * len(getattr(view.layer, "kernel_size", ()))
        if self.feedforward:
            self.parameter("ia3_l", (1, view.in_features, *ones))
        else:
            self.parameter("ia3_l", (1, view.out_features, *ones) if view.kind == "conv" else (view.out_features, 1))

    @torch.no_grad()
    def reset(self, config: IA3Config) -> None:
        if config.init_ia3_weights:
            self.ia3_l.fill_(1.0)
        else:
            self.ia3_l.normal_()

    def scale_in(self) -> torch.Tensor | None:
        return self.ia3_l.flatten() if self.feedforward else None

    def scale_out(self) -> torch.Tensor | None:
        return None if self.feedforward else self.ia3_l.flatten()

    @classmethod
    def default_targets(cls, modules: ModuleMap) -> list[str]:
        return modules.roles("key", "value", "fused", "ff_down") or modules.role("linear") or modules.role("conv")

    @classmethod
    def placements(cls, modules: ModuleMap, config: Any, *, strict: bool) -> list[Placement]:
        paths = modules.select(config, cls.default_targets, strict=strict)
        if config.feedforward_modules is None:
            inner = set(modules.role("ff_down")) & set(paths)
            config.feedforward_modules = compact_names(sorted(inner), modules.modules)
            others = [path for path in paths if path not in inner]
            config.target_modules = compact_names(others, modules.modules) + config.feedforward_modules
        inner = {p for p in paths if matches_any(config.feedforward_modules, p)}
        own = {True: replace(config, feedforward_modules="this"), False: config}
        return [Placement(path, cls, config=own[path in inner]) for path in paths]
