"""A class for every pixel: Segformer and all others with a semantic segmentation head in transformers.

A row is a picture and a mask, a file that holds the number of a class in every pixel. The model answers at a part of the
picture's size; its scores are brought to the size at which it reads pictures, where loss and figures are taken too. The
first figure is the mean over the classes of intersection over union (Jaccard), over all pixels of all rows together.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from afina.core.config import option
from afina.data.example import Column, Example, Kind
from afina.data.media import SIDES
from afina.data.pictures import ENDINGS, MASK, PICTURE, read_mask
from afina.data.table import Table
from afina.errors import ConfigError, DataError, Problems
from afina.tasks.loading import load_base, own_labels, renew_heads
from afina.tasks.pictures import PictureOptions, PictureTask, cut_out
from afina.tasks.task import Batch, Encoded, Feature, Figure, Rows

__all__ = ["SegmentationOptions", "SemanticSegmentation"]

_NONE = 255  # the usual number of pixels that have no class
_MOST = 1000  # classes; a larger number in a mask is rather no class


@dataclasses.dataclass
class SegmentationOptions(PictureOptions):
    """What the numbers of a mask mean, and how training pictures are varied."""

    classes: list[str] = option(None, "names of the numbers in the masks, from 0 on; none: the numbers", factory=list)
    ignored: int = option(_NONE, "number of pixels that count neither in the loss nor in the figures", low=0)


def make(row: Mapping[str, str], line: int | str) -> Example:
    """The paths of a picture and of its mask."""
    return Example(row["image"], row.get("label", ""), line, [row["image"], row.get("label", "")])


def read_pairs(path: Path) -> Table | None:
    """A folder with `images` and `masks`, below folders of sides or not; a mask is called as its picture is."""
    if not path.is_dir():
        return None
    below = [p for p in sorted(path.iterdir()) if p.name.lower() in SIDES and (p / "images").is_dir()]
    sides = {p: SIDES[p.name.lower()] for p in below}
    places = sides or ({path: ""} if (path / "images").is_dir() else {})
    if not places:
        return None
    problems = Problems(str(path))
    table = Table(path, ["image", "label"], [], [], "", "", image="image", label="label", sides=[] if sides else None)
    for place, side in places.items():
        masks = {p.stem: p for p in sorted((place / "masks").glob("*")) if p.suffix.lower() in MASK.endings}
        for picture in sorted(p for p in (place / "images").glob("*") if p.suffix.lower() in ENDINGS):
            if picture.stem not in masks:
                wanted = (place / "masks").relative_to(path) / f"{picture.stem}.png"
                problems.add(f"{picture.relative_to(path)} has no mask {wanted}")
                continue
            table.rows.append((str(picture.absolute()), str(masks[picture.stem].absolute())))
            table.lines.append(str(picture.relative_to(path)))
            if table.sides is not None:
                table.sides.append(side)
    problems.raise_as(DataError)
    if not table.rows:
        raise DataError(f"{path}: its folder images holds no picture")
    return table


class SemanticSegmentation(PictureTask):
    """One class of several for every pixel of a picture."""

    name = "semantic_segmentation"
    task_type = None
    kind = Kind(
        columns={
            "image": Column("the path of the picture", ("image", "file_name", "file", "path", "filename", "image_path"),
                            repair=False, medium=PICTURE),
            "label": Column("the path of the mask", ("mask", "label", "annotation", "mask_path"), repair=False, medium=MASK),
        },
        labels="text",
        make=make,
        read=read_pairs,
    )  # fmt: skip
    figures = {
        "mean_iou": Figure("mean IoU"),
        "pixel_accuracy": Figure("right pixels", ".1%"),
        "loss": Figure("loss", better=-1),
    }
    Options: ClassVar[type] = SegmentationOptions

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(processor, options, learned)
        if "segmentation_maps" not in inspect.signature(processor.preprocess).parameters:
            raise ConfigError(f"{type(processor).__name__} knows no masks, so its model is none for semantic segmentation")
        names, found = self.options.classes, self.learned.get("labels", [])
        if names and len(names) < len(found):
            raise ConfigError(f"task.classes names {len(names)} classes, but the masks hold numbers up to {len(found) - 1}")
        if names:
            self.learned["labels"] = list(names)

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """The numbers that masks hold, up to the largest; raises DataError where a mask holds no classes."""
        most, problems = 1, Problems("the masks")
        for example in (*train, *others):
            if example.value[1]:
                numbers = np.unique(read_mask(example.value[1]))
                most = max(most, *(int(n) for n in numbers if n != _NONE), 0)
                if most > _MOST:
                    problems.add(f"{example.value[1]} holds the number {most}: is it a mask of classes?")
                    break
        problems.raise_as(DataError)
        return {"labels": [str(i) for i in range(most + 1)]}

    @classmethod
    def stand_ins(cls, options: Any) -> list[Example] | None:
        """Two pictures of one colour."""
        return [Example(name, name, i, ["", ""]) for i, name in enumerate(("first", "second"), 1)]

    def load_model(self, path: str) -> Any:
        """The base with one output a class and pixel; new ones where its classes are other than the checkpoint's."""
        from transformers import AutoModelForSemanticSegmentation

        own, names = own_labels(path), dict(enumerate(self.labels))
        model = load_base(
            self, AutoModelForSemanticSegmentation, path, num_labels=len(names), id2label=names,
            label2id={label: i for i, label in names.items()},
        )  # fmt: skip
        self.check_size(model)
        if len(own) == len(names) and own != self.labels and not self.storage.empty:
            renew_heads(model, len(own))
        return model

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Paths of pictures, and of masks where examples have them."""
        features: list[Feature] = []
        for i, example in enumerate(examples):
            feature: Feature = {"file": example.value[0], "holds": example.text, "length": 1, "row": i}
            features.append(feature | ({"mask": example.value[1]} if example.label else {}))
        return Encoded(features, 0, None)

    def ready(self, feature: Feature, chance: str | None = None) -> Feature:
        """With "pixel_values" `[channels, height, width]` and, where there is a mask, "labels" `[height, width]`."""
        picture, mask = self.opened(feature), self._mask(feature)
        if mask is not None and mask.shape[::-1] != picture.size:
            said = " x ".join(map(str, mask.shape[::-1]))
            raise DataError(f"{feature['mask']} has {said} pixels, its picture {' x '.join(map(str, picture.size))}")
        drawn = random.Random(chance) if chance is not None and self.varies else None
        picture = picture if drawn is None else self.varied(picture, drawn)
        if drawn is not None and "crop" in self.options.augment:
            box = cut_out(picture.size, self.options.crop, drawn)
            picture = picture.crop(box)
            mask = mask[box[1] : box[3], box[0] : box[2]] if mask is not None else None
        made = self.processor(images=picture, segmentation_maps=mask, return_tensors="np", do_reduce_labels=False)
        parts = {"pixel_values": np.asarray(made["pixel_values"][0], dtype=np.float32)}
        if mask is not None:
            parts["labels"] = np.asarray(made["labels"][0], dtype=np.int64)
        if drawn is not None and "flip" in self.options.augment and drawn.random() < 0.5:
            parts = {name: part[..., ::-1].copy() for name, part in parts.items()}
        return {**feature, **parts}

    def _mask(self, feature: Feature) -> np.ndarray | None:
        if "mask" not in feature:
            return None
        if not feature["mask"]:  # it stands for any
            return np.zeros(self.opened(feature).size[::-1], np.int32)
        mask: np.ndarray = read_mask(feature["mask"])
        beyond = mask[(mask >= len(self.labels)) & (mask != self.options.ignored)]
        if beyond.size:
            known = len(self.labels) - 1
            raise DataError(f"{feature['mask']} holds the number {beyond.max()}; the model knows 0 to {known}")
        return mask

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Pixels `[rows, channels, height, width]` and, where there are masks, labels `[rows, height, width]`."""
        made = [f if "pixel_values" in f else self.ready(f) for f in features]
        batch = super().collate(made)
        if "labels" in made[0]:
            batch["labels"] = torch.from_numpy(np.stack([f["labels"] for f in made]))
        return batch

    # --- loss and answers

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Scores `[rows, classes, height, width]` in float32, at the size of the pixels that the model reads."""
        pixels = batch["pixel_values"]
        scores = model(pixel_values=pixels).logits.float()
        return F.interpolate(scores, size=pixels.shape[-2:], mode="bilinear", align_corners=False)

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Probabilities of the classes of every pixel."""
        return torch.softmax(self.logits(model, batch).double(), dim=1)

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Pixels that have a class."""
        return float((batch["labels"] != self.options.ignored).sum())

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy, summed over the pixels that have a class."""
        scores = self.logits(model, batch)
        return F.cross_entropy(
            scores, batch["labels"], ignore_index=self.options.ignored, reduction="sum", label_smoothing=self.label_smoothing
        )

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """The class of every pixel, uint16; for rows with a mask, what was taken for what and the loss."""
        scores = self.logits(model, batch)
        best = scores.argmax(dim=1)
        found: list[Any] = [{"mask": row.cpu().numpy().astype(np.uint16)} for row in best]
        if "labels" in batch:
            losses = F.cross_entropy(scores, batch["labels"], ignore_index=self.options.ignored, reduction="none")
            for row, truth, answer, loss in zip(found, batch["labels"], best, losses, strict=True):
                row["taken"], row["loss"] = self._taken(truth, answer), float(loss.double().sum())
        return found

    def _taken(self, truth: torch.Tensor, answer: torch.Tensor) -> np.ndarray:
        """Pixels by their class (down) and by the answer (across)."""
        n, there = len(self.labels), truth != self.options.ignored
        return torch.bincount(truth[there] * n + answer[there], minlength=n * n).view(n, n).cpu().numpy()

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """Intersection over union of each class, their mean over the classes that are there, and right pixels."""
        return self._figures(sum(a["taken"] for a in answers), sum(a["loss"] for a in answers), len(answers))

    def _figures(self, taken: Any, loss: float, rows: int) -> dict[str, Any]:
        hits, either = taken.diagonal(), taken.sum(0) + taken.sum(1) - taken.diagonal()
        each = {label: float(h / e) if e else None for label, h, e in zip(self.labels, hits, either, strict=True)}
        there = [share for share in each.values() if share is not None]
        pixels = max(1, int(taken.sum()))
        return {
            "rows": rows,
            "loss": loss / pixels,
            "mean_iou": float(np.mean(there)) if there else None,
            "pixel_accuracy": float(hits.sum() / pixels),
            "iou": each,
            "pixels": {label: int(n) for label, n in zip(self.labels, taken.sum(1), strict=True)},
        }

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Every pixel the commonest class."""
        known, there = (self._counted(side) for side in (train, test))
        taken = np.zeros((len(known), len(known)), dtype=np.int64)
        taken[:, int(known.argmax())] = there
        shares = np.clip(known / max(1, known.sum()), 1e-12, None)
        figures = self._figures(taken, float(-(there * np.log(shares)).sum()), len(test.examples))
        return {"majority": {"title": "every pixel the commonest class", **figures}}

    def _counted(self, side: Rows) -> np.ndarray:
        total = np.zeros(len(self.labels), dtype=np.int64)
        for feature in side.features:
            mask = self._mask(feature)
            assert mask is not None
            total += np.bincount(mask[mask != self.options.ignored], minlength=len(self.labels))[: len(self.labels)]
        return total

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The share of each class that is there, the largest first, and for a row with a mask its mean IoU."""
        said = {"answer": ", ".join(f"{label} {share:.1%}" for label, share in self._shares(answer).items())}
        if "taken" in answer:
            said["mean_iou"] = f"{self._figures(answer['taken'], 0.0, 1)['mean_iou']:.4f}"
        return said

    def _shares(self, answer: Any) -> dict[str, float]:
        counts = np.bincount(answer["mask"].ravel(), minlength=len(self.labels)) / answer["mask"].size
        return {self.labels[i]: float(counts[i]) for i in np.argsort(-counts, kind="stable") if counts[i]}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The share of each class that is there."""
        return {"shares": self._shares(answer)}

    def arrays(self, answers: Sequence[Any | None]) -> dict[str, Any]:
        """The masks `[rows, height, width]`, at the size at which the model reads pictures."""
        known = next(a["mask"] for a in answers if a is not None)
        return {"masks": np.stack([np.zeros_like(known) if a is None else a["mask"] for a in answers])}
