"""Any number of labels a text: each label is a yes or no of its own.

The loss is binary cross-entropy, summed over rows and labels. A label is answered where its probability reaches 0.5, or a
threshold of its own that is chosen on the validation rows (`task.thresholds: tuned`): rare labels seldom reach 0.5.

In a file the labels of a row are a JSON list, or stand between commas, semicolons or bars; which of them is found out,
and must be the same in the whole file. A row may have none: that is written `[]`, and is not the same as an empty cell.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from afina.core.config import option
from afina.data.example import Column, Example, Kind
from afina.errors import DataError, Problems
from afina.tasks.baselines import label_frequencies, words_of_each_label
from afina.tasks.calibration import as_two_classes, compared, fit_temperature, tempered
from afina.tasks.metrics import multi_label_metrics
from afina.tasks.sequence_classification import SequenceClassification
from afina.tasks.sequence_classification import make as make_text
from afina.tasks.task import Batch, Encoded, Figure, Rows

__all__ = ["MultiLabelClassification", "MultiLabelOptions", "best_threshold", "labels_of"]

SEPARATORS = {"|": "bars", ";": "semicolons", ",": "commas"}
NONE = "[]"  # how a row without any label is written
ENOUGH = 5  # validation rows with a label, and without it, from which on its threshold is chosen
USUAL = 0.5


@dataclasses.dataclass
class MultiLabelOptions:
    """How probabilities become labels."""

    thresholds: str = option(
        "fixed",
        "from which probability on a label is answered; fixed: 0.5, tuned: what is best on the validation rows",
        choices=("fixed", "tuned"),
    )
    calibrate: bool = option(False, "scale probabilities by a temperature chosen on the validation rows")


def labels_of(text: str) -> list[str]:
    """The labels in a cell, sorted; raises ValueError where they cannot be told apart."""
    if text.lstrip().startswith("["):
        try:
            names = json.loads(text)
        except json.JSONDecodeError:
            names = None
        if not isinstance(names, list) or not all(isinstance(n, str | int) and not isinstance(n, bool) for n in names):
            raise ValueError(f'{text[:60]!r} is no list of labels; expected, for example, ["news", "sports"]')
        names = [str(name) for name in names]
        if commas := [name for name in names if "," in name]:
            raise ValueError(f"label {commas[0]!r} holds a comma, which stands between labels; write it in another way")
    else:
        found = [mark for mark in SEPARATORS if mark in text]
        if len(found) > 1:
            two = " and ".join(SEPARATORS[mark] for mark in found)
            raise ValueError(f'{text[:60]!r} holds {two}; separate labels by one alone, or write a list, ["news", "sports"]')
        names = text.split(found[0]) if found else [text]
    names = [" ".join(name.split()) for name in names]
    if "" in names:
        raise ValueError(f"{text[:60]!r} holds an empty label")
    return sorted(set(names))


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A text, or two as one, and its labels, sorted and joined by commas."""
    example = make_text({**row, "label": ""}, line)
    if not row.get("label"):
        return example
    return dataclasses.replace(example, label=", ".join(labels_of(row["label"])) or NONE)


def names_in(label: str) -> list[str]:
    """The labels of an example."""
    return [] if label == NONE else [name.strip() for name in label.split(",")]


class MultiLabelClassification(SequenceClassification):
    """Any number of labels a text, or a pair of texts."""

    name = "multi_label_classification"
    kind = Kind(
        columns={
            **SequenceClassification.kind.columns,
            "label": Column("the labels, a list or separated", ("labels", "label", "tags", "topics"), structured=True),
        },
        labels="classes",
        make=make,
    )
    figures = {
        "mean_average_precision": Figure("mean average precision"),
        "macro_f1": Figure("macro F1"),
        "micro_f1": Figure("micro F1"),
        "subset_accuracy": Figure("all labels right", ".1%"),
        "loss": Figure("loss", better=-1),
    }
    Options = MultiLabelOptions

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """The labels, in alphabetical order, and what stands between them in the file."""
        _check_separator([*train, *others])
        names = sorted({name for e in (*train, *others) for name in names_in(e.label)})
        known = {name for e in train for name in names_in(e.label)}
        if not names:
            raise DataError("no row has any label; there is nothing to learn")
        if unknown := [name for name in names if name not in known]:
            raise DataError(f"no training row has the label {', '.join(map(repr, unknown))}; add rows, or leave it out")
        return {"labels": names}

    def load_model(self, path: str) -> Any:
        """The base with a head of one output a label."""
        model = super().load_model(path)
        model.config.problem_type = "multi_label_classification"
        return model

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """As of one label; the target is 0 or 1 for each label."""
        encoded = super().encode([dataclasses.replace(e, label="") for e in examples], max_length, limit)
        for feature in encoded.features:
            if label := examples[feature["row"]].label:
                feature["label"] = self._target(label)
        encoded.notes.extend(f"labels are separated by {SEPARATORS[mark]}" for mark in _separators(examples))
        if none := sum(e.label == NONE for e in examples):
            encoded.notes.append(f"{none} row{'s' if none > 1 else ''} without any label, which is an answer too")
        return encoded

    def _target(self, label: str) -> list[float]:
        names = names_in(label)
        if unknown := sorted(set(names) - set(self.labels)):
            raise DataError(f"labels the model does not know: {', '.join(unknown)}. It knows {', '.join(self.labels)}")
        return [float(name in names) for name in self.labels]

    # --- loss

    def _element_weights(self, labels: torch.Tensor) -> torch.Tensor:
        """Of each yes its label's weight, of each no one: `[rows, labels]`."""
        weights = self._weights(labels.device)
        return torch.ones_like(labels) if weights is None else torch.where(labels > 0, weights.to(labels.dtype), 1.0)

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Rows times labels, or the sum of their weights."""
        return float(self._element_weights(batch["labels"]).sum())

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Binary cross-entropy, summed over rows and labels."""
        labels = batch["labels"]
        aimed = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(
            self.logits(model, batch), aimed, self._element_weights(labels), reduction="sum"
        )

    # --- answers

    @property
    def thresholds(self) -> np.ndarray:
        """Probability `[labels]` from which on each label is answered."""
        return np.asarray(self.learned.get("thresholds") or [USUAL] * len(self.labels))

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Probabilities of each label by itself, `[rows, labels]`, float64."""
        return torch.sigmoid(self.logits(model, batch).double() / self.temperature)

    @property
    def settles(self) -> bool:
        """Whether a temperature or thresholds are asked for."""
        return self.options.calibrate or self.options.thresholds == "tuned"

    def settle(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """Temperature and thresholds, where they are asked for."""
        learned: dict[str, Any] = {}
        probabilities, truth = np.stack(list(answers)), self._truth(examples)
        if self.options.calibrate:
            two = as_two_classes(probabilities)
            learned["temperature"] = fit_temperature(two.reshape(-1, 2), truth.reshape(-1).astype(int))
            probabilities = tempered(two, learned["temperature"])[..., 1]
        if self.options.thresholds == "tuned":
            learned["thresholds"] = [best_threshold(p, t) for p, t in zip(probabilities.T, truth.T, strict=True)]
        return learned

    def _truth(self, examples: Sequence[Example]) -> np.ndarray:
        return np.asarray([self._target(e.label) for e in examples], dtype=bool)

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """See `multi_label_metrics`."""
        probabilities, truth = np.stack(answers), self._truth(examples)
        made = multi_label_metrics(probabilities, truth, self.labels, self.thresholds)
        if "temperature" in self.learned:
            two = as_two_classes(probabilities).reshape(-1, 2)
            made["calibration"] = compared(two, truth.reshape(-1).astype(int), self.temperature)
        return made

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Each label's share of the training rows, and words counted for each label; both answer from 0.5 on."""
        known, truth = self._truth(train.examples), self._truth(test.examples)
        texts = [e.text for e in test.examples]
        made = {
            "word_counts": (
                "words counted (naive Bayes for each label)",
                words_of_each_label([e.text for e in train.examples], known, texts),
            ),
            "frequencies": ("how frequent each label is", label_frequencies(known, len(texts))),
        }
        return {
            key: {"title": title, **multi_label_metrics(p, truth, self.labels, [USUAL] * len(self.labels))}
            for key, (title, p) in made.items()
        }

    def _answered(self, answer: Any) -> list[str]:
        return [label for label, yes in zip(self.labels, np.asarray(answer) >= self.thresholds, strict=True) if yes]

    def right(self, answer: Any, example: Example) -> bool:
        """Whether all labels are answered and no others."""
        return self._answered(answer) == sorted(names_in(example.label))

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The labels between commas, `[]` for none, and the probability of each."""
        names = {f"p({label})": f"{p:.6f}" for label, p in zip(self.labels, answer, strict=True)}
        return {"answer": ", ".join(self._answered(answer)) or NONE, **names}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The labels, and the probability of each."""
        values = {label: float(p) for label, p in zip(self.labels, answer, strict=True)}
        return {"labels": self._answered(answer), "probabilities": values}


def best_threshold(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The probability `[rows]` from which on answering yes has the best F1; in the middle between two rows.

    0.5 where there are fewer than five rows with the label, or without it, since so few say little.
    """
    yes = int(truth.sum())
    if min(yes, len(truth) - yes) < ENOUGH:
        return USUAL
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    f1 = 2 * np.cumsum(truth[order]) / (np.arange(1, len(order) + 1) + yes)
    f1[:-1][ranked[:-1] == ranked[1:]] = -1.0  # equal rows cannot be told apart
    best = int(f1.argmax())
    return float((ranked[best] + (ranked[best + 1] if best + 1 < len(ranked) else 0.0)) / 2)


def _separators(examples: Sequence[Example]) -> dict[str, Example]:
    """What stands between labels, and the first row in which it does."""
    first: dict[str, Example] = {}
    for example in examples:
        cell = (example.row).get("label", "")
        if not cell.lstrip().startswith("["):
            for mark in SEPARATORS:
                if mark in cell:
                    first.setdefault(mark, example)
    return first


def _check_separator(examples: Sequence[Example]) -> None:
    """Raises DataError where rows of one file have different separators, naming a row of each."""
    first = _separators(examples)
    problems = Problems("the labels of a row are separated in different ways")
    if len(first) > 1:
        for mark, example in first.items():
            problems.add(f"line {example.line} by {SEPARATORS[mark]}: {example.row['label'][:60]!r}")
    problems.raise_as(DataError, 'Use one of them in the whole file, or lists: ["news", "sports"]')
