"""A number a text, or a pair of texts: how severe, how alike, how much.

The model is trained on targets brought to mean 0 and standard deviation 1 by the training rows, so that the learning rate
does not depend on the unit; both are kept with the run, and answers are in the unit of the file.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from afina.data.example import Column, Example, Kind
from afina.errors import DataError
from afina.tasks.baselines import word_ridge
from afina.tasks.loading import load_base
from afina.tasks.metrics import regression_metrics
from afina.tasks.sequence_classification import SequenceClassification
from afina.tasks.sequence_classification import make as make_text
from afina.tasks.task import Batch, Encoded, Figure, NoOptions, Rows

__all__ = ["Regression", "number_in"]


def number_in(text: str) -> float:
    """The number in a cell; raises ValueError saying what is there instead."""
    try:
        value = float(text.replace("_", "x"))  # Python reads 1_000 as a number, files do not mean it
    except ValueError:
        cure = ""
        if re.fullmatch(r"[+-]?\d+,\d+", text.strip()):
            cure = f"; is the comma a decimal one? Write {text.strip().replace(',', '.')}"
        raise ValueError(f"{text[:40]!r} is no number{cure}") from None
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]!r} is no number to learn from; expected a finite one")
    return value


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A text, or two as one, and its number."""
    example = make_text(row, line)
    if example.label:
        number_in(example.label)
    return example


class Regression(SequenceClassification):
    """A number a text, or a pair of texts."""

    name = "regression"
    kind = Kind(
        columns={
            **SequenceClassification.kind.columns,
            "label": Column("the number", ("score", "rating", "value", "target", "label")),
        },
        labels="number",
        make=make,
    )
    figures = {
        "rmse": Figure("RMSE", ".4g", better=-1),
        "mae": Figure("MAE", ".4g", better=-1),
        "r2": Figure("R²"),
        "spearman": Figure("Spearman"),
        "loss": Figure("loss", better=-1),
    }
    Options = NoOptions
    smooths = False

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """Mean and standard deviation of the training rows."""
        values = np.asarray([number_in(e.label) for e in train])
        if np.ptp(values) == 0:
            raise DataError(f"the number is {values[0]:g} in every training row; there is nothing to learn")
        return {"mean": float(values.mean()), "deviation": float(values.std())}

    def load_model(self, path: str) -> Any:
        """The base with a head of one output."""
        from transformers import AutoModelForSequenceClassification

        return load_base(self, AutoModelForSequenceClassification, path, num_labels=1, problem_type="regression")

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """As of one label; the target is the number in standard deviations from the mean."""
        encoded = super().encode([dataclasses.replace(e, label="") for e in examples], max_length, limit)
        for feature in encoded.features:
            if label := examples[feature["row"]].label:
                feature["label"] = (number_in(label) - self.learned["mean"]) / self.learned["deviation"]
        return encoded

    # --- loss

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its rows."""
        return float(batch["labels"].numel())

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Squared error in standard deviations, summed."""
        return F.mse_loss(self.outputs(model, batch).float(), batch["labels"].float(), reduction="sum")

    # --- answers

    settles = False

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Answers `[rows]` in standard deviations from the mean."""
        return self.logits(model, batch).squeeze(-1)

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """The number for each row, in the unit of the file."""
        standard = self.outputs(model, batch).double().cpu().numpy()
        return (standard * self.learned["deviation"] + self.learned["mean"]).tolist()

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """See `regression_metrics`; `loss` is the squared error in standard deviations of the training rows."""
        made = regression_metrics(np.asarray(answers), self._targets(examples))
        return {**made, "loss": made["mse"] / self.learned["deviation"] ** 2}

    def _targets(self, examples: Sequence[Example]) -> Any:
        return np.asarray([number_in(e.label) for e in examples])

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Always the mean, and ridge regression on which words a text has."""
        texts = [e.text for e in test.examples]
        ridge = word_ridge([e.text for e in train.examples], self._targets(train.examples), texts)
        made = {
            "word_counts": ("words counted (ridge regression)", ridge.tolist()),
            "mean": ("always the mean", [self.learned["mean"]] * len(texts)),
        }
        return {key: {"title": title, **self.metrics(answers, test.examples)} for key, (title, answers) in made.items()}

    def right(self, answer: Any, example: Example) -> Any:
        """No question of yes and no."""
        return None

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The number."""
        return {"answer": f"{answer:.6g}"}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The number."""
        return {"value": answer}
