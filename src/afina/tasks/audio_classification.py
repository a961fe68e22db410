"""One class a recording: wav2vec2 and its kin, AST, Whisper's encoder, and all others with such a head in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from afina.data.example import Column, Example, Kind
from afina.data.sounds import SOUND
from afina.tasks.classification import Classification, ClassificationOptions
from afina.tasks.files import FileClassification
from afina.tasks.loading import load_base, own_labels, renew_heads
from afina.tasks.sounds import SoundOptions, SoundTask, steady

__all__ = ["AudioClassification", "AudioClassificationOptions"]

_HEADS = ("projector.", "classifier.", "layer_weights")


@dataclasses.dataclass
class AudioClassificationOptions(SoundOptions, ClassificationOptions):
    """How much of a recording is read, and what is done with probabilities."""


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A path and its label."""
    return Example(row["audio"], row.get("label", ""), line, row["audio"])


class AudioClassification(FileClassification, SoundTask, Classification):
    """One class of several for a recording."""

    name = "audio_classification"
    task_type = None
    kind = Kind(
        columns={
            "audio": Column("the path of the recording",
                            ("audio", "file_name", "file", "path", "filename", "audio_path", "wav"),
                            repair=False, medium=SOUND),
            "label": Column("the class", ("label", "class", "category", "target")),
        },
        labels="class",
        make=make,
    )  # fmt: skip
    Options: ClassVar[type] = AudioClassificationOptions

    def load_model(self, path: str) -> Any:
        """The base with a head of one output a label; a new one where its classes are other than the checkpoint's."""
        from transformers import AutoModelForAudioClassification

        own, settings = own_labels(path), steady(path)
        kept = set(own) == set(self.labels)
        if kept:  # the checkpoint's head knows these classes: it stays, and so does its order
            self.learned["labels"] = own
        else:
            settings |= self.heads()
        model = load_base(self, AutoModelForAudioClassification, path, heads=_HEADS, **settings)
        if not kept and len(own) == len(self.labels) and not self.storage.empty:
            renew_heads(model, len(own))
        self.settle_padding(model)
        return model
