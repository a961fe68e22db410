"""What tasks with one class a row have in common, whatever the row is: labels, loss, probabilities, figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from afina.core.config import option
from afina.data.example import Example
from afina.tasks.baselines import majority
from afina.tasks.calibration import compared, fit_temperature
from afina.tasks.metrics import classification_metrics
from afina.tasks.task import Batch, Figure, Rows, Task

__all__ = ["Classification", "ClassificationOptions"]


@dataclasses.dataclass
class ClassificationOptions:
    """What is done with probabilities."""

    calibrate: bool = option(False, "scale probabilities by a temperature chosen on the validation rows")


class Classification(Task):
    """One class of several a row. What a row is, and the model, is for the task to say."""

    figures = {
        "macro_f1": Figure("macro F1"),
        "accuracy": Figure("accuracy", ".1%"),
        "roc_auc": Figure("ROC AUC"),
        "loss": Figure("loss", better=-1),
    }
    Options: ClassVar[type] = ClassificationOptions
    options: Any

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """The labels, in alphabetical order."""
        return {"labels": sorted({e.label for e in (*train, *others)})}

    def heads(self) -> dict[str, Any]:
        """Settings of the configuration that give the model one output a label."""
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {label: i for i, label in names.items()}}

    # --- loss

    def _weights(self, device: torch.device) -> torch.Tensor | None:
        return None if self.class_weights is None else torch.tensor(self.class_weights, device=device)

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its rows, or the sum of their classes' weights."""
        weights = self._weights(batch["labels"].device)
        return float(batch["labels"].numel() if weights is None else weights[batch["labels"]].sum())

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy, summed."""
        logits = self.logits(model, batch)
        weights = self._weights(logits.device)
        return F.cross_entropy(logits, batch["labels"], weights, reduction="sum", label_smoothing=self.label_smoothing)

    # --- answers

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """Probabilities `[classes]` of each row, float64."""
        return list(self.outputs(model, batch).cpu().numpy())

    @property
    def temperature(self) -> float:
        """What scores are divided by before they become probabilities; see `calibration.py`."""
        return float(self.learned.get("temperature", 1.0))

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Probabilities `[rows, classes]`, float64."""
        return torch.softmax(self.logits(model, batch).double() / self.temperature, dim=-1)

    @property
    def settles(self) -> bool:
        """Whether a temperature is asked for."""
        return bool(self.options.calibrate)

    def settle(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """The temperature."""
        return {"temperature": fit_temperature(np.stack(answers), np.asarray(self._targets(examples)))}

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """See `classification_metrics`."""
        probabilities, targets = np.stack(answers), self._targets(examples)
        made = classification_metrics(probabilities, targets, self.labels)
        if "temperature" in self.learned:
            made["calibration"] = compared(probabilities, np.asarray(targets), self.temperature)
        return made

    def _targets(self, examples: Sequence[Example]) -> list[int]:
        number = {label: i for i, label in enumerate(self.labels)}
        return [number[e.label] for e in examples]

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Always the commonest class."""
        targets = self._targets(test.examples)
        constant = majority(self._targets(train.examples), len(targets), len(self.labels))
        figures = classification_metrics(constant, targets, self.labels)
        return {"majority": {"title": "always the commonest class", **figures}}

    def right(self, answer: Any, example: Example) -> bool:
        """Whether the likeliest class is the label."""
        return self.labels[int(answer.argmax())] == example.label

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The likeliest class, and the probability of each."""
        names = {f"p({label})": f"{p:.6f}" for label, p in zip(self.labels, answer, strict=True)}
        return {"answer": self.labels[int(answer.argmax())], **names}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The likeliest class, and the probability of each."""
        values = {label: float(p) for label, p in zip(self.labels, answer, strict=True)}
        return {"label": max(values, key=values.__getitem__), "probabilities": values}
