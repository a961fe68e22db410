"""What tasks whose rows name files have in common: pictures, recordings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from afina.data.example import Example
from afina.tasks.task import NO_LIMIT, Batch, Encoded, Feature, Task

__all__ = ["FileClassification", "FileTask"]


class FileTask(Task):
    """A task whose rows name a file each, which is read when it is needed."""

    reads_files = True

    @classmethod
    def stand_ins(cls, options: Any) -> list[Example] | None:
        """Two files that need not be there, as large as they are read at most."""
        return [Example(label, label, i, "") for i, label in enumerate(("first", "second"), 1)]

    def limit(self, model: Any) -> int:
        """None that is known."""
        return NO_LIMIT


class FileClassification(Task):
    """One class a file; stands before the task of the medium, whose features and batches it gives labels."""

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """What the medium makes of each row, and labels where examples have them."""
        made: Encoded = super().encode(examples, max_length, limit)  # type: ignore[safe-super]
        number = {label: i for i, label in enumerate(self.labels)}
        for feature, example in zip(made.features, examples, strict=True):
            if example.label:
                feature["label"] = number[example.label]
        return made

    def collate(self, features: Sequence[Feature]) -> Batch:
        """What the model reads and, where the features have them, labels `[rows]`."""
        batch: Batch = super().collate(features)  # type: ignore[safe-super]
        if "label" in features[0]:
            batch["labels"] = torch.tensor([f["label"] for f in features])
        return batch
