"""Better answers made likelier than worse ones, directly from pairs: DPO and its relatives.

With x the logarithm by how much likelier the better answer has become, beside the reference, less the same of the worse
one, the loss of a pair is

    sigmoid   -log sigmoid(beta x)       Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; with label smoothing e, of
                                         judgements that are wrong in a share of e: Chowdhury et al. 2024, 2403.00409
    ipo       (x - 1 / (2 beta))^2       x of means over tokens; Azar et al. 2023, https://arxiv.org/abs/2310.12036
    hinge     max(0, 1 - beta x)         Zhao et al. 2023, https://arxiv.org/abs/2305.10425
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from afina.core.config import option
from afina.data.example import Example
from afina.errors import ConfigError
from afina.tasks.pairs import longer_is_better, pair_figures
from afina.tasks.policy import Policy, PolicyOptions
from afina.tasks.preferences import PAIRS, scored_pairs
from afina.tasks.task import Batch, Figure, Rows

__all__ = ["DPO", "DPOOptions", "PairPolicy"]


@dataclasses.dataclass
class DPOOptions(PolicyOptions):
    """What a recipe may say of it."""

    loss: str = option("sigmoid", "of a pair", choices=("sigmoid", "ipo", "hinge"))
    label_smoothing: float = option(0.0, "share of pairs that are taken to stand the wrong way round", low=0.0, high=0.49)


class PairPolicy(Policy):
    """What tasks that learn from pairs have in common."""

    kind = dataclasses.replace(
        PAIRS, columns={**PAIRS.columns, "text_pair": dataclasses.replace(PAIRS.columns["text_pair"], asked=False)}
    )
    figures = {
        "accuracy": Figure("pairs ranked right", ".1%"),
        "margin": Figure("margin"),
        "kl": Figure("KL per token", ".4f", better=-1),
        "loss": Figure("loss", better=-1),
    }

    def scores(self, answer: Any) -> list[float]:
        """What the policy's implicit reward of both answers is."""
        return [self.options.beta * ratio for ratio in answer.ratios]

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """Figures of pairs (see `pair_figures`), the divergence from the reference per token, the mean loss, and how many
        pairs the reference itself finds likelier in the right order."""
        likelier = [a.reference[0] / a.tokens[0] > a.reference[1] / a.tokens[1] for a in answers]
        return {
            "rows": len(examples),
            **pair_figures([self.scores(a) for a in answers]),
            "kl": self.far(answers),
            "loss": float(np.mean([self.loss_of(a) for a in answers])),
            "reference_accuracy": float(np.mean(likelier)),
            **self.written(answers, examples),
        }

    def loss_of(self, answer: Any) -> float:
        """The loss of one pair."""
        raise NotImplementedError

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """The length of the answers."""
        title, scores = longer_is_better(scored_pairs(train.examples), scored_pairs(test.examples))
        return {"length": {"title": title, "rows": len(scores), **pair_figures(scores)}}

    def right(self, answer: Any, example: Example) -> bool | None:
        """Whether the better answer is ranked above the worse one."""
        better, worse = self.scores(answer)
        return better > worse

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The written text; of a pair, by how much likelier each answer has become, in units of reward."""
        if not answer.policy:
            return {"answer": answer.text or ""}
        better, worse = self.scores(answer)
        return {"answer": answer.text or "", "margin": f"{better - worse:.6f}", "better": f"{better:.6f}",
                "worse": f"{worse:.6f}"}  # fmt: skip


class DPO(PairPolicy):
    """Preference tuning on pairs of a better and a worse answer to a prompt, against a frozen reference."""

    name = "dpo"
    Options: ClassVar[type] = DPOOptions  # type: ignore[assignment]
    options: DPOOptions

    def __init__(self, tokenizer: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(tokenizer, options, learned)
        if self.options.label_smoothing and self.options.loss != "sigmoid":
            raise ConfigError(
                f"task.label_smoothing={self.options.label_smoothing:g} belongs to task.loss=sigmoid; with "
                f"{self.options.loss} leave it out"
            )

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss of each pair, summed."""
        known = self.referred(model, batch)
        own, tokens = self.log_probs(model, batch)
        ratios = own - known
        better, worse = (self.options.beta * ratios.detach()).chunk(2)
        self.note(margin=better - worse, accuracy=(better > worse).float())
        if self.options.loss == "ipo":
            ratios = ratios / tokens
        first, second = ratios.chunk(2)
        return self.losses(first - second).sum()

    def losses(self, x: torch.Tensor) -> torch.Tensor:
        """The loss of each difference `[pairs]`."""
        beta, share = self.options.beta, self.options.label_smoothing
        if self.options.loss == "ipo":
            return (x - 1 / (2 * beta)) ** 2
        if self.options.loss == "hinge":
            return F.relu(1 - beta * x)
        return -(1 - share) * F.logsigmoid(beta * x) - share * F.logsigmoid(-beta * x)

    def loss_of(self, answer: Any) -> float:
        """See `losses`."""
        better, worse = answer.ratios
        if self.options.loss == "ipo":
            better, worse = better / answer.tokens[0], worse / answer.tokens[1]
        value = float(self.losses(torch.tensor(better - worse, dtype=torch.float64)))
        return value if math.isfinite(value) else math.inf
