"""What is added to latents, and what the model is to say of it.

Chance is drawn row by row, each from a number of its own, so that a step in several parts, or on several processes, learns
what it would learn in one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from afina.errors import ConfigError

__all__ = ["Noise", "seed_of"]


def seed_of(*about: Any) -> int:
    """A number for what is drawn, from what it belongs to."""
    return int.from_bytes(hashlib.blake2b(repr(about).encode(), digest_size=7).digest())


@dataclass
class Noise:
    """The way noise is made in a pipeline, from its scheduler."""

    flow: bool
    kept: list[float]  # share of the picture's power that is left at each step of a diffusion; of a flow none
    tells: str  # epsilon, v_prediction or sample
    shift: float = 1.0  # of a flow: how much more of its time is spent in much noise

    @classmethod
    def of(cls, scheduler: Any, *, flow: bool) -> Noise:
        """Raises ConfigError for a scheduler whose noise is not known."""
        config = scheduler.config
        if flow:
            if not type(scheduler).__name__.startswith("FlowMatch"):
                raise ConfigError(f"the pipeline's scheduler is a {type(scheduler).__name__}; expected one of flow matching")
            return cls(True, [], "flow", float(config.get("shift") or 1.0))
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ConfigError(f"the pipeline's scheduler is a {type(scheduler).__name__}, whose noise is not known")
        tells = config.get("prediction_type", "epsilon")
        if tells not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(
                f"the pipeline's scheduler has prediction_type={tells!r}; expected epsilon, v_prediction or sample"
            )
        return cls(False, scheduler.alphas_cumprod.tolist(), tells)

    def time(self, chance: torch.Generator) -> float:
        """A moment, as the model is told it: a step of a diffusion; of a flow, from 0 to 1000, oftenest in the middle."""
        if not self.flow:
            return float(torch.randint(len(self.kept), (1,), generator=chance))
        return self._moved(float(torch.sigmoid(torch.randn(1, generator=chance))))

    def spread(self, count: int) -> list[float]:
        """So many moments, evenly over all there are."""
        shares = [(i + 0.5) / count for i in range(count)]
        return [self._moved(s) if self.flow else float(int(s * len(self.kept))) for s in shares]

    def _moved(self, share: float) -> float:
        return 1000 * self.shift * share / (1 + (self.shift - 1) * share)

    def mixed(self, latents: torch.Tensor, noise: torch.Tensor, times: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents at those moments, and what the model is to say of them."""
        if self.flow:
            share = torch.tensor(times, device=latents.device).view(-1, 1, 1, 1) / 1000
            return (1 - share) * latents + share * noise, noise - latents
        left = torch.tensor([self.kept[int(t)] for t in times], device=latents.device).view(-1, 1, 1, 1)
        noisy = left.sqrt() * latents + (1 - left).sqrt() * noise
        if self.tells == "epsilon":
            return noisy, noise
        return noisy, latents if self.tells == "sample" else left.sqrt() * noise - (1 - left).sqrt() * latents
