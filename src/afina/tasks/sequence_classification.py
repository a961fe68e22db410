"""One label a text, or a pair of texts: encoders with a head on the first token, decoders with a head on the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from afina.data.example import Column, Example, Kind
from afina.errors import DataError
from afina.tasks.baselines import word_counts
from afina.tasks.batches import pad_right
from afina.tasks.classification import Classification
from afina.tasks.loading import load_base
from afina.tasks.metrics import classification_metrics
from afina.tasks.task import Batch, Encoded, Feature, Rows

__all__ = ["SequenceClassification"]


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A text, or two as one, and its label."""
    pair = row.get("text_pair", "")
    value = (row["text"], pair) if pair else None
    return Example(f"{row['text']}\n{pair}" if pair and row["text"] else row["text"], row.get("label", ""), line, value)


class SequenceClassification(Classification):
    """One class of several for a text, or for a pair of texts."""

    name = "sequence_classification"
    widens = True
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

    # --- model

    def load_model(self, path: str) -> Any:
        """The base with a head of one output a label."""
        from transformers import AutoModelForSequenceClassification

        return load_base(self, AutoModelForSequenceClassification, path, **self.heads())

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
        batch = pad_right(features, self.tokenizer.pad_token_id, self.width(features))
        if "label" in features[0]:
            batch["labels"] = torch.tensor([f["label"] for f in features])
        return batch

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Always the commonest class, and words counted."""
        known, targets = self._targets(train.examples), self._targets(test.examples)
        texts = [[e.text for e in side.examples] for side in (train, test)]
        counted = classification_metrics(word_counts(texts[0], known, texts[1], len(self.labels)), targets, self.labels)
        return {"word_counts": {"title": "words counted (naive Bayes)", **counted}, **super().baselines(train, test)}
