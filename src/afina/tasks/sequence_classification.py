"""One label a text, or a pair of texts: encoders with a head on the first token, decoders with a head on the last."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from afina.core.config import option
from afina.data.example import Column, Example, Kind
from afina.errors import DataError
from afina.tasks.baselines import majority, word_counts
from afina.tasks.batches import pad_right
from afina.tasks.calibration import compared, fit_temperature
from afina.tasks.loading import load_base
from afina.tasks.metrics import classification_metrics
from afina.tasks.task import Batch, Encoded, Feature, Figure, Rows, Task

__all__ = ["ClassificationOptions", "SequenceClassification"]


@dataclasses.dataclass
class ClassificationOptions:
    """What is done with probabilities."""

    calibrate: bool = option(False, "scale probabilities by a temperature chosen on the validation rows")


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A text, or two as one, and its label."""
    pair = row.get("text_pair", "")
    value = (row["text"], pair) if pair else None
    return Example(f"{row['text']}\n{pair}" if pair and row["text"] else row["text"], row.get("label", ""), line, value)


class SequenceClassification(Task):
    """One class of several for a text, or for a pair of texts."""

    name = "sequence_classification"
    task_type = "SEQ_CLS"
    kind = Kind(
        columns={
            "text": Column("the text", ("text", "sentence", "message", "content", "review")),
            "text_pair": Column("a second text that goes with the first", (), required=False),
            "label": Column("the class", ("label", "class", "category", "target")),
        },
        labels="class",
        make=make,
    )
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

    # --- model

    def load_model(self, path: str) -> Any:
        """The base with a head of one output a label."""
        from transformers import AutoModelForSequenceClassification

        names = dict(enumerate(self.labels))
        return load_base(
            self, AutoModelForSequenceClassification, path, num_labels=len(names), id2label=names,
            label2id={label: i for i, label in names.items()},
        )  # fmt: skip

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Token ids of every text, its end cut off at `max_length`; of a pair, the longer text is cut."""
        first = [e.value[0] if e.value else e.text for e in examples]
        second = [e.value[1] for e in examples] if examples[0].value else None
        whole = self.tokenizer(first, second, truncation=False, padding=False, add_special_tokens=True)
        longest = max(len(row) for row in whole["input_ids"])
        length = min(limit, longest) if max_length is None else max_length
        cut = sum(len(row) > length for row in whole["input_ids"])
        if cut:
            whole = self.tokenizer(first, second, truncation=True, max_length=length, padding=False)
        number = {label: i for i, label in enumerate(self.labels)}
        features: list[Feature] = []
        for i, example in enumerate(examples):
            ids = self._without_trailing_pads(list(whole["input_ids"][i]))
            feature: Feature = {"input_ids": ids, "row": i}
            if second is not None and "token_type_ids" in whole:
                feature["token_type_ids"] = list(whole["token_type_ids"][i])[: len(ids)]
            if example.label:
                feature["label"] = number[example.label]
            features.append(feature)
        empty = [e.text for e, f in zip(examples, features, strict=True) if not f["input_ids"]]
        if empty:
            raise DataError(f"{len(empty)} texts have no token at all, for example {empty[0]!r}")
        return Encoded(features, cut, length)

    def _without_trailing_pads(self, row: list[int]) -> list[int]:
        """An end token that is also the padding token would be pooled over: every text ends at its last real token."""
        while row and row[-1] == self.tokenizer.pad_token_id:
            row.pop()
        return row

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Ids and mask `[rows, tokens]` and, where the features have them, labels `[rows]`."""
        batch = pad_right(features, self.tokenizer.pad_token_id)
        if "label" in features[0]:
            batch["labels"] = torch.tensor([f["label"] for f in features])
        return batch

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
        """Always the commonest class, and words counted."""
        n, known, targets = len(self.labels), self._targets(train.examples), self._targets(test.examples)
        texts = [e.text for e in test.examples]
        counted = word_counts([e.text for e in train.examples], known, texts, n)
        constant = majority(known, len(texts), n)
        return {
            "word_counts": {
                "title": "words counted (naive Bayes)", **classification_metrics(counted, targets, self.labels)
            },
            "majority": {
                "title": "always the commonest class", **classification_metrics(constant, targets, self.labels)
            },
        }  # fmt: skip

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
