"""Answers judged one by one, good or bad: KTO. Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306.

With r the logarithm by how much likelier an answer has become, beside the reference, a good answer costs
1 - sigmoid(beta (r - z)) and a bad one 1 - sigmoid(beta (z - r)). z is how far the policy has left its reference: the mean
of r over answers that belong to other prompts of the step, not below 0, without a gradient. It is the same for all parts
and processes of a step. Figures take z from the divergence at the rows' own answers instead, which is exact at each place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from afina.core.config import option
from afina.data.example import Example
from afina.tasks.batches import has_values, pad_right, padded
from afina.tasks.orders import roc_auc
from afina.tasks.policy import Policy, PolicyOptions
from afina.tasks.preferences import BAD, GOOD, JUDGED
from afina.tasks.task import IGNORED, Batch, Feature, Figure, Rows

__all__ = ["KTO", "KTOOptions"]

Piece = tuple[int, list[int], list[int]]  # number of a row, tokens of its prompt, of its answer


@dataclasses.dataclass
class KTOOptions(PolicyOptions):
    """What a recipe may say of it."""

    desirable_weight: float = option(1.0, "of good answers in the loss", low=0.0)
    undesirable_weight: float = option(1.0, "of bad answers in the loss", low=0.0)


class KTO(Policy):
    """Preference tuning on single answers that are good or bad, against a frozen reference."""

    name = "kto"
    kind = JUDGED
    figures = {
        "auc": Figure("good above bad", ".1%"),
        "margin": Figure("margin"),
        "kl": Figure("KL per token", ".4f", better=-1),
        "loss": Figure("loss", better=-1),
    }
    Options: ClassVar[type] = KTOOptions
    options: KTOOptions

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """The two judgements."""
        return {**super().learn(train, others), "labels": [GOOD, BAD]}

    # --- rows

    def _about(self, example: Example) -> Feature:
        return {"good": int(example.label == GOOD)} if example.label else {}

    def collate(self, features: Sequence[Feature]) -> Batch:
        """As of a policy, with "good", "number" and "begin", where each answer begins, `[rows]`."""
        batch = super().collate(features)
        if "labels" in batch:
            batch["good"] = torch.tensor([f["good"] for f in features])
            batch["number"] = torch.tensor([f["row"] for f in features])
            batch["begin"] = torch.tensor([f["answer_at"] for f in features])
        return batch

    # --- how far the policy is from the reference

    @property
    def varies(self) -> str:
        """Prompts are read with answers of other rows of their step."""
        return "task=kto, which tries answers behind other prompts,"

    @property
    def parts_share(self) -> bool:
        """Rows of a step are measured against the same distance."""
        return True

    def share(self, model: Any, parts: Sequence[Batch], gather: Callable[[Any], list[Any]], process: int) -> None:
        """Every part gets the distance of the whole step."""
        own = [self._split(part) for part in parts]
        everyone = sorted(piece for of_process in gather(own) for pieces in of_process for piece in pieces)
        made = [self._strayed(model, part, pieces, everyone) for part, pieces in zip(parts, own, strict=True)]
        ratios = [value for of_process in gather(made) for values in of_process for value in values]
        for part in parts:
            part["distance"] = torch.tensor(max(0.0, sum(ratios) / max(1, len(ratios))), device=part["input_ids"].device)

    def _split(self, batch: Batch) -> list[Piece]:
        if not has_values(batch["input_ids"]):
            return []
        rows = zip(
            batch["number"].tolist(), batch["begin"].tolist(), batch["attention_mask"].sum(1).tolist(),
            batch["input_ids"].tolist(), strict=True,
        )  # fmt: skip
        return [(number, ids[:begin], ids[begin:length]) for number, begin, length, ids in rows]

    @torch.no_grad()
    def _strayed(self, model: Any, batch: Batch, own: list[Piece], everyone: list[Piece]) -> list[float]:
        """By how much likelier the answer of the next row of the step has become after each prompt."""
        if len(everyone) == 1:
            return [0.0]
        mixed = batch
        if own:
            place = {piece[0]: i for i, piece in enumerate(everyone)}
            answers = [everyone[(place[number] + 1) % len(everyone)][2] for number, _, _ in own]
            room = batch["input_ids"].shape[1]
            stacked = [(prompt, answer[: max(1, room - len(prompt))])
                       for (_, prompt, _), answer in zip(own, answers, strict=True)]  # fmt: skip
            mixed = pad_right([{"input_ids": [*p, *a]} for p, a in stacked], self.tokenizer.pad_token_id)
            mixed["labels"] = padded([[*[IGNORED] * len(p), *a] for p, a in stacked], IGNORED)
            mixed = {key: value.to(batch["input_ids"].device) for key, value in mixed.items()}
        mixed = {key: value for key, value in mixed.items() if key != "reference"}
        training, _ = model.training, model.eval()
        ratios = self.log_probs(model, mixed)[0] - self.referred(model, mixed)
        model.train(training)
        return ratios.tolist() if own else []  # type: ignore[no-any-return]

    # --- loss

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss of each answer, summed."""
        if "distance" not in batch:
            self.share(model, [batch], lambda value: [value], 0)
        ratios = self.log_probs(model, batch)[0] - self.referred(model, batch)
        self.note(reward=self.options.beta * ratios, distance=batch["distance"])
        return self.losses(ratios, batch["good"].bool(), batch["distance"]).sum()

    def losses(self, ratios: torch.Tensor, good: torch.Tensor, distance: torch.Tensor | float) -> torch.Tensor:
        """The loss of each answer `[rows]`."""
        weights = self.class_weights or (1.0, 1.0)
        of_good, of_bad = self.options.desirable_weight * weights[0], self.options.undesirable_weight * weights[1]
        sign, weight = good * 2.0 - 1.0, torch.where(good, of_good, of_bad)
        return weight * (1.0 - torch.sigmoid(sign * self.options.beta * (ratios - distance)))

    # --- figures

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """How often a good answer has a higher reward than a bad one, by how much, and how far the policy has gone."""
        rewards = np.asarray([self.options.beta * a.ratios[0] for a in answers])
        good = np.asarray([e.label == GOOD for e in examples])
        far, loss = self.far(answers), None
        if far is not None:
            distance = max(0.0, float(np.mean([a.divergence for a in answers])))
            ratios = torch.tensor([a.ratios[0] for a in answers]).double()
            loss = float(self.losses(ratios, torch.tensor(good), distance).mean())
        both = good.any() and not good.all()
        return {
            "rows": len(examples),
            "auc": roc_auc(rewards, good),
            "margin": float(rewards[good].mean() - rewards[~good].mean()) if both else None,
            "kl": far,
            "loss": loss,
            **self.written(answers, examples),
        }

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """The length of the answer."""

        def lengths(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
            sizes = [float(len(e.value.answers[0])) for e in rows.examples]
            return np.asarray(sizes), np.asarray([e.label == GOOD for e in rows.examples])

        longer = (roc_auc(*lengths(train)) or 0.0) >= 0.5
        sizes, good = lengths(test)
        title = f"the {'longer' if longer else 'shorter'} answer is better"
        return {"length": {"title": title, "rows": len(sizes), "auc": roc_auc(sizes if longer else -sizes, good)}}

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The written text; of a judged answer, its implicit reward."""
        made = {"answer": answer.text or ""}
        if not answer.policy:
            return made
        reward = self.options.beta * answer.ratios[0]
        sign = 1.0 if example.label == GOOD else -1.0
        return {**made, "judged": example.label, "reward": f"{reward:.6f}", "margin": f"{sign * reward:.6f}"}
