"""The next token of one text: the likeliest, or drawn. Each text has its own random numbers, so that a seed gives the same
text whatever it was computed with."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Chooser", "Choosing"]


@dataclass(frozen=True)
class Choosing:
    """How tokens are chosen; `temperature` 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Chooser:
    """Chooses the tokens of one text. `processors` are those that the checkpoint asks for (a forced first token, and so on),
    functions of the ids so far `[1, n]` and the scores `[1, vocabulary]`."""

    def __init__(self, how: Choosing, prompt: Sequence[int], processors: Any):
        self.how, self.prompt, self.processors = how, list(prompt), processors
        self.chance = torch.Generator()
        self.chance.manual_seed(how.seed if how.seed is not None else secrets.randbits(63))

    def __call__(self, scores: torch.Tensor, written: Sequence[int]) -> int:
        """The next token, from scores `[vocabulary]` and the tokens written so far."""
        scores = scores.float()
        if self.processors:
            ids = torch.tensor([[*self.prompt, *written]], device=scores.device)
            scores = self.processors(ids, scores[None])[0]
        how = self.how
        if written and (how.presence_penalty or how.frequency_penalty):
            counts = Counter(written)
            tokens = torch.tensor(list(counts), device=scores.device)
            often = torch.tensor(list(counts.values()), device=scores.device)
            scores = scores.index_add(0, tokens, -(how.presence_penalty + how.frequency_penalty * often))
        if how.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(self._probabilities(scores.cpu().double()), 1, generator=self.chance))

    def _probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(scores / self.how.temperature, dim=-1)
        if self.how.top_k is not None and self.how.top_k < len(probabilities):
            least = probabilities.topk(self.how.top_k).values[-1]
            probabilities = torch.where(probabilities < least, 0.0, probabilities)
        if self.how.top_p < 1:
            ordered, order = (probabilities / probabilities.sum()).sort(descending=True)
            behind = ordered.cumsum(0) - ordered >= self.how.top_p  # the first is never left out
            probabilities = probabilities.clone()
            probabilities[order[behind]] = 0.0
        return probabilities
