"""Pairs that belong together, learned from each other: of all passages of a step, which goes with this query?

The loss (InfoNCE, also called multiple negatives ranking; https://arxiv.org/abs/1705.00652) depends on every other pair of
the step, so parts of a step must know of each other, or accumulation would change what is learned (T25). As in GradCache
(https://arxiv.org/abs/2101.06983) all vectors of the step are computed first, without gradients, a part at a time; the loss
of the whole step and its gradient at each vector follow from them; then each part computes its vectors again and sends
those gradients through. With dropout the second pass draws what the first one drew (`replay.py`). Memory is that of one
part, the gradient that of the whole step; the price is one more forward pass.

A candidate that is a right passage of the query, in whichever row, or the query itself, is not a wrong one and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["Texts", "ranking_losses", "step_gradients"]


@dataclass(frozen=True)
class Texts:
    """The texts of rows by number (`passages.py`)."""

    queries: torch.Tensor  # [rows]
    passages: torch.Tensor  # [rows], the right ones
    right: torch.Tensor  # [rows, most], all right passages of each query; filled with -1
    negatives: torch.Tensor  # [negatives]

    @classmethod
    def joined(cls, parts: list[Texts]) -> Texts:
        """Of several parts, one after the other."""
        most = max(part.right.shape[1] for part in parts)
        right = [F.pad(part.right, (0, most - part.right.shape[1]), value=-1) for part in parts]
        flat = (torch.cat([getattr(part, key) for part in parts]) for key in ("queries", "passages"))
        queries, passages = flat
        return cls(queries, passages, torch.cat(right), torch.cat([part.negatives for part in parts]))

    def to(self, device: torch.device) -> Texts:
        """The same, there."""
        return Texts(*(t.to(device) for t in (self.queries, self.passages, self.right, self.negatives)))


def left_out(texts: Texts) -> torch.Tensor:
    """Which candidates `[rows, rows + negatives]` are no wrong answers, the own one aside: it is the right one."""
    candidates = torch.cat([texts.passages, texts.negatives])
    same = texts.queries[:, None] == candidates
    for right in texts.right.T:
        same |= right[:, None] == candidates
    return same & ~torch.eye(len(same), len(candidates), dtype=torch.bool, device=same.device)


def ranking_losses(
    queries: torch.Tensor, passages: torch.Tensor, negatives: torch.Tensor, texts: Texts, temperature: float
) -> torch.Tensor:
    """Loss `[rows]`: the mean of both directions, of queries among all passages and of right passages among all queries.

    `queries` and `passages` are `[rows, width]`, `negatives` is `[negatives, width]`, all of length 1; in float32.
    """
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.float() @ torch.cat([passages, negatives]).float().T / temperature
        scores = scores.masked_fill(left_out(texts), -torch.inf)
        right = torch.arange(len(scores), device=scores.device)
        there = F.cross_entropy(scores, right, reduction="none")
        return (there + F.cross_entropy(scores[:, : len(scores)].T, right, reduction="none")) / 2


def step_gradients(
    queries: torch.Tensor, passages: torch.Tensor, negatives: torch.Tensor, texts: Texts, temperature: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Losses of a whole step `[rows]`, and the gradients of their sum at its queries, passages and negatives."""
    with torch.enable_grad():
        live = [vectors.detach().requires_grad_() for vectors in (queries, passages, negatives)]
        losses = ranking_losses(live[0], live[1], live[2], texts, temperature)
        gradients = torch.autograd.grad(losses.sum(), live)
    return losses.detach(), gradients
