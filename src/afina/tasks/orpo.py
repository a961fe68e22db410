"""Better answers learned by heart and set apart from worse ones in one loss, without a reference: ORPO.

The loss of a pair is the loss per token of the better answer plus `beta` times -log sigmoid of the logarithm of the odds
ratio of both, the probability of an answer being the geometric mean of its tokens'. Hong, Lee and Thorne 2024,
https://arxiv.org/abs/2403.07691.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from afina.tasks.dpo import PairPolicy
from afina.tasks.policy import PolicyOptions
from afina.tasks.task import Batch

__all__ = ["ORPO"]

_SURE = -1e-6  # the largest mean log-probability whose odds are looked at


class ORPO(PairPolicy):
    """Preference tuning on pairs of a better and a worse answer, together with learning the better one."""

    name = "orpo"
    compares = refers = False
    Options: ClassVar[type] = PolicyOptions  # type: ignore[assignment]

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss of each pair, summed."""
        own, tokens = self.log_probs(model, batch)
        means = own / tokens
        better, worse = means.detach().chunk(2)
        self.note(margin=self.options.beta * (better - worse), accuracy=(better > worse).float())
        return self.losses(*means.chunk(2)).sum()

    def losses(self, better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
        """The loss of each pair `[pairs]`, from the mean log-probability of a token of each answer."""
        odds = [mean - torch.log1p(-torch.exp(mean)) for mean in (better.clamp(max=_SURE), worse.clamp(max=_SURE))]
        return -better - self.options.beta * F.logsigmoid(odds[0] - odds[1])

    def scores(self, answer: Any) -> list[float]:
        """`beta` times the mean log-probability of a token of each answer: there is no reference to compare with."""
        return [self.options.beta * p / n for p, n in zip(answer.policy, answer.tokens, strict=True)]

    def loss_of(self, answer: Any) -> float:
        """See `losses`."""
        means = (torch.tensor(p / n, dtype=torch.float64) for p, n in zip(answer.policy, answer.tokens, strict=True))
        value = float(self.losses(*means))
        return value if math.isfinite(value) else math.inf
