"""Pairs that belong together, learned from each other: of all second texts of a step, which goes with this first one?

The loss (InfoNCE, also called multiple negatives ranking; https://arxiv.org/abs/1705.00652) depends on every other pair of
the step, so parts of a step must know of each other, or accumulation would change what is learned (T25). Each part gets
the vectors of the others as constants, computes the loss of the whole step and sends the gradient through its own
vectors. The gradients of all parts then add up to that of the step, as in GradCache (https://arxiv.org/abs/2101.06983).

A candidate that is the same text as the right answer, or the right answer to the same text, is not a wrong one and is left
out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["ranking_losses", "ranks", "step_loss"]


def alike(texts: torch.Tensor) -> torch.Tensor:
    """Which candidates `[pairs, pairs]` are no wrong answers, from numbers of the texts `[pairs, 2]`; not the own one."""
    first, second = texts[:, 0], texts[:, 1]
    same = (first[:, None] == first) | (second[:, None] == second) | (first[:, None] == second)
    return same & ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)


def ranking_losses(first: torch.Tensor, second: torch.Tensor, texts: torch.Tensor, temperature: float) -> torch.Tensor:
    """Loss `[pairs]`: the mean of both directions. Vectors `[pairs, width]` have length 1."""
    scores = (first @ second.T / temperature).masked_fill(alike(texts), -torch.inf)
    right = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, right, reduction="none") + F.cross_entropy(scores.T, right, reduction="none")) / 2


def step_loss(
    own: torch.Tensor, step: torch.Tensor, place: int, texts: torch.Tensor, temperature: float
) -> torch.Tensor:
    """What a part adds to the summed loss of its step, with the gradient of the whole step for its own vectors.

    `own [2, pairs, width]` are the vectors of the part, `step [2, pairs of the step, width]` those of all parts, in which
    the own ones begin at `place`; `texts [pairs of the step, 2]`.
    """
    end = place + own.shape[1]
    both = torch.cat([step[:, :place], own, step[:, end:]], dim=1)
    losses = ranking_losses(both[0], both[1], texts, temperature)
    total = losses.sum()
    return losses[place:end].sum().detach() + (total - total.detach())


def ranks(first: torch.Tensor, second: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Rank `[pairs]`, from 1, of each right answer among all second texts; equal scores share the mean of their ranks."""
    scores = first @ second.T
    own = scores.diagonal()[:, None]
    wrong = ~alike(texts) & ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    return 1 + ((scores > own) & wrong).sum(dim=1) + ((scores == own) & wrong).sum(dim=1) / 2
