"""One class a picture: ViT, Swin, ConvNeXt, MobileNet and all others with a classification head in transformers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from afina.core.config import option
from afina.data.example import Column, Example, Kind
from afina.data.pictures import PICTURE
from afina.tasks.classification import Classification, ClassificationOptions
from afina.tasks.files import FileClassification
from afina.tasks.loading import load_base, own_labels, renew_heads
from afina.tasks.pictures import PictureOptions, PictureTask

__all__ = ["ImageClassification", "ImageClassificationOptions"]


@dataclasses.dataclass
class ImageClassificationOptions(PictureOptions, ClassificationOptions):
    """How training pictures are varied, and what is done with probabilities."""

    rotate: float = option(0.0, "turn training pictures by up to so many degrees, either way", low=0.0, high=180.0)


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A path and its label."""
    return Example(row["image"], row.get("label", ""), line, row["image"])


class ImageClassification(FileClassification, PictureTask, Classification):
    """One class of several for a picture."""

    name = "image_classification"
    task_type = None
    kind = Kind(
        columns={
            "image": Column("the path of the picture", ("image", "file_name", "file", "path", "filename", "image_path"),
                            repair=False, medium=PICTURE),
            "label": Column("the class", ("label", "class", "category", "target")),
        },
        labels="class",
        make=make,
    )  # fmt: skip
    Options: ClassVar[type] = ImageClassificationOptions

    def load_model(self, path: str) -> Any:
        """The base with a head of one output a label; a new one where its classes are other than the checkpoint's."""
        from transformers import AutoModelForImageClassification

        own = own_labels(path)
        if set(own) == set(self.labels):  # the checkpoint's head knows these classes: it is kept, and so is its order
            self.learned["labels"] = own
            return self.check_size(load_base(self, AutoModelForImageClassification, path))
        model = self.check_size(load_base(self, AutoModelForImageClassification, path, **self.heads()))
        if len(own) == len(self.labels) and not self.storage.empty:
            renew_heads(model, len(own))
        return model

    def varied(self, picture: Any, drawn: random.Random) -> Any:
        """Turned too, with the mean colour of its corners around it."""
        from PIL import Image

        if most := self.options.rotate:
            ends = (0, picture.width - 1), (0, picture.height - 1)
            corners = np.array([picture.getpixel((x, y)) for x in ends[0] for y in ends[1]])
            around = tuple(int(v) for v in corners.mean(0).round())
            picture = picture.rotate(drawn.uniform(-most, most), Image.Resampling.BILINEAR, fillcolor=around)
        return super().varied(picture, drawn)
