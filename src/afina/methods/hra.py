"""HRA: rotate the input by a chain of r Householder reflections. y = base(x R), R = H_r ... H_1, H = I - 2 u u.T / |u|^2.

Yuan et al. 2024, https://arxiv.org/abs/2405.17484. The chain is one product of rank r (the compact form of Schreiber and
Van Loan 1989, https://doi.org/10.1137/0910005): with unit vectors V, R = I - V M^-1 V.T, where M is the part of V.T V below
the diagonal and 1/2 on it. Cost: two thin products a layer; kept for backward: x and the r values of x V. It starts as the
base when the vectors come in equal pairs, whose reflections cancel; r is even then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from afina.core.adapter import Rotation, cast
from afina.core.config import TargetedConfig, option
from afina.core.registry import register
from afina.errors import Problems

__all__ = ["HRA", "HRAConfig"]


@dataclass
class HRAConfig(TargetedConfig):
    """Options of HRA."""

    peft_type: ClassVar[str] = "HRA"
    overrides: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}
    foreign: ClassVar[Mapping[str, object]] = {"apply_GS": False, "bias": "none"}
    beyond_peft: ClassVar[frozenset[str]] = frozenset({"rank_pattern", "trainable_token_indices", "ensure_weight_tying"})

    r: int = option(8, "number of reflections, even", low=1)
    init_weights: bool = option(True, "start as the base; False: random vectors")
    rank_pattern: dict[str, int] = option(None, "r of the modules that a pattern names", factory=dict)

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.init_weights and isinstance(self.r, int) and self.r % 2:
            problems.add(f"r={self.r}: an even number is needed to start as the base (init_weights=True)")


@register(
    "hra",
    config=HRAConfig,
    trains="r reflections of each layer's input",
    cost="2 thin products a layer; none when merged",
    paper="https://arxiv.org/abs/2405.17484",
)
class HRA(Rotation):
    def build(self, config: HRAConfig) -> None:
        self.parameter("hra_u", (self.view.in_features, config.r))

    @torch.no_grad()
    def reset(self, config: HRAConfig) -> None:
        half = torch.empty(self.hra_u.shape[0], (config.r + 1) // 2, device=self.device, dtype=self.dtype)
        torch.nn.init.kaiming_uniform_(half, a=5**0.5)
        if config.init_weights:
            self.hra_u.copy_(half.repeat_interleave(2, dim=1)[:, : config.r])
        else:
            torch.nn.init.kaiming_uniform_(self.hra_u, a=5**0.5)

    def values_kept(self, rows: int) -> int:
        r = self.hra_u.shape[1]
        return rows * (self.view.in_features + r) + 6 * self.hra_u.numel() + 4 * r * r

    def rotate(self, x: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
        across, back = self.factors(transposed)
        if x.dim() < 2:
            return x - x @ cast(across, x) @ cast(back, x)
        rows = x.flatten(0, -2)
        return torch.addmm(rows, rows @ cast(across, x), cast(back, x), alpha=-1).view(x.shape)

    def factors(self, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """V `[in, r]` and S `[r, in]` with R = I - V S, or R.T; in full precision, since R is to be orthogonal."""
        with torch.autocast(self.hra_u.device.type, enabled=False):
            v = torch.nn.functional.normalize(self.hra_u, dim=0)
            turned = v.T
            halves = torch.eye(v.shape[1], dtype=v.dtype, device=v.device).mul_(0.5)
            inner = (turned @ v).tril(-1) + halves
            if transposed:
                return v, torch.linalg.solve_triangular(inner.T, turned, upper=True)
            return v, torch.linalg.solve_triangular(inner, turned, upper=False)
