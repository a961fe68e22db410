"""What tasks on pictures have in common: a picture becomes what the model's image processor makes of it, when it is needed.

Features hold a path and a digest; pixels are read when a batch is made (by threads, a step ahead), so that a folder of any
size takes the memory of two steps. Augmentation cuts out a part of a training picture and mirrors it; what is drawn follows
from seed, step and row alone.

BatchNorm keeps the statistics of the checkpoint, whatever is trained: estimated anew from small batches they would follow
the size of the parts a step is computed in (T25), and the frozen layers above would read other numbers than they were
trained on. Its scale and shift can be trained like any other weight.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from afina.core.config import option
from afina.data.example import Example
from afina.data.pictures import read_picture
from afina.errors import ConfigError, DataError
from afina.tasks.files import FileTask
from afina.tasks.task import Batch, Encoded, Feature

__all__ = ["PictureOptions", "PictureTask", "cut_out"]

_SIZE = (640, 480)  # of a picture that stands for any
_VARYING = ("augment", "rotate", "colour", "hue")  # options that make a training picture another each time
_ASPECTS = (3 / 4, 4 / 3)


@dataclasses.dataclass
class PictureOptions:
    """How pictures are read, and training pictures are varied."""

    augment: str = option(
        "none", "vary training pictures: crop cuts out a part, flip mirrors every second one, crop_and_flip does both",
        choices=("none", "crop", "flip", "crop_and_flip"),
    )  # fmt: skip
    crop: float = option(0.5, "smallest share of a picture's area that a crop keeps", low=0.01, high=1.0)
    colour: float = option(
        0.0, "vary brightness, contrast and saturation of training pictures, each by up to this share", low=0.0, high=1.0
    )  # fmt: skip
    hue: float = option(0.0, "turn the colours of training pictures by up to this share of the circle", low=0.0, high=0.5)
    whole: bool = option(
        False, "read pictures to their edges, where the model's image processor would cut a border away"
    )  # fmt: skip
    size: int = option(0, "pixels of a side at which pictures are read; 0: what the model was made for", low=0)


def cut_out(size: tuple[int, int], least: float, chance: random.Random) -> tuple[int, int, int, int]:
    """A box (left, upper, right, lower) of at least this share of the area, of any shape between 3:4 and 4:3 of the
    picture's own."""
    width, height = size
    for _ in range(10):
        area = chance.uniform(least, 1.0) * width * height
        aspect = width / height * np.exp(chance.uniform(*np.log(_ASPECTS)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, upper = chance.randint(0, width - w), chance.randint(0, height - h)
            return left, upper, left + w, upper + h
    return 0, 0, width, height


class PictureTask(FileTask):
    """A task whose input is a picture. `Options` has the fields of `PictureOptions`."""

    processor_kind: ClassVar[str] = "image_processor"
    unit: ClassVar[str] = "pictures"
    options: Any

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(reading(processor, options or self.Options()), options, learned)
        self.sizes: dict[tuple[int, int], tuple[int, int]] = {}  # of pictures, and as the model gets them

    @property
    def varies(self) -> str:
        """How pictures are augmented."""
        asked = {key: value for key, value in vars(self.options).items() if key in _VARYING and value not in ("none", 0.0)}
        return ", ".join(f"task.{key}={value}" for key, value in asked.items())

    def paths(self, model: Any) -> list[str]:
        """Hold the statistics of BatchNorm still, and say so."""
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.eval()
            norm.train = _stays(norm)  # type: ignore[method-assign]
        if not norms:
            return []
        return [f"{len(norms)} BatchNorm layers keep the statistics of the checkpoint, in training too"]

    def check_size(self, model: Any) -> Any:
        """The model; ConfigError where it reads pictures at one size alone, and another is asked for."""
        made_for = getattr(model.config, "image_size", None)
        tables = [n for n, _ in model.named_parameters() if "position_embedding" in n and "relative" not in n]
        if self.options.size and tables and self.options.size != made_for:
            raise ConfigError(
                f"task.size={self.options.size}: {type(model).__name__} has a table of positions for pictures of {made_for} "
                "pixels, and reads no others; leave it out"
            )
        return model

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """The path of every picture and a digest of what it holds; its targets are for the task to add."""
        features = [{"file": e.value, "holds": e.text, "length": 1, "row": i} for i, e in enumerate(examples)]
        return Encoded(features, 0, None)

    def ready(self, feature: Feature, chance: str | None = None) -> Feature:
        """With "pixel_values" `[channels, height, width]` float32, as the processor makes them."""
        return {**feature, "pixel_values": self._pixels(self.opened(feature), chance)}

    def opened(self, feature: Feature) -> Any:
        """The picture of a feature. Raises DataError where it can no longer be read."""
        if not feature["file"]:
            from PIL import Image

            return Image.new("RGB", _SIZE)
        try:
            return read_picture(feature["file"])
        except (ValueError, OSError) as error:
            raise DataError(f"{feature['file']}: {error}; it could be read when the run began") from None

    def _pixels(self, picture: Any, chance: str | None) -> np.ndarray:
        if chance is None or not self.varies:
            return self._processed(picture)
        from PIL import Image

        drawn = random.Random(chance)
        picture = self.varied(picture, drawn)
        if "crop" not in self.options.augment:
            return self._flipped(self._processed(picture), drawn)
        box = cut_out(picture.size, self.options.crop, drawn)
        cut = picture.resize(self._size(picture.size), Image.Resampling.BILINEAR, box=box)
        return self._flipped(self._processed(cut, do_resize=False, do_center_crop=False), drawn)

    def varied(self, picture: Any, drawn: random.Random) -> Any:
        """In another light, and other colours."""
        from PIL import Image, ImageEnhance

        share = self.options.colour
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color) if share else ():
            picture = kind(picture).enhance(drawn.uniform(1 - share, 1 + share))
        if self.options.hue:
            turn = round(drawn.uniform(-self.options.hue, self.options.hue) * 256)
            hue, *rest = picture.convert("HSV").split()
            picture = Image.merge("HSV", (hue.point(lambda v: (v + turn) % 256), *rest)).convert("RGB")
        return picture

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of a picture of this size as the model gets it."""
        if size not in self.sizes:
            from PIL import Image

            _, height, width = self._processed(Image.new("RGB", size)).shape
            self.sizes[size] = width, height
        return self.sizes[size]

    def _flipped(self, pixels: np.ndarray, drawn: random.Random) -> np.ndarray:
        return pixels[..., ::-1].copy() if "flip" in self.options.augment and drawn.random() < 0.5 else pixels

    def _processed(self, picture: Any, **settings: Any) -> np.ndarray:
        made = self.processor(images=picture, return_tensors="np", **settings)["pixel_values"]
        return np.asarray(made[0], dtype=np.float32)

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Pixels `[rows, channels, height, width]`."""
        made = [f if "pixel_values" in f else self.ready(f) for f in features]
        shapes = {f["pixel_values"].shape: f["file"] for f in made}
        if len(shapes) > 1:
            said = ", ".join(f"{list(shape)} ({file})" for shape, file in list(shapes.items())[:3])
            raise DataError(f"this model's image processor makes pictures of different sizes: {said}; a batch needs one")
        pixels = torch.from_numpy(np.stack([f["pixel_values"] for f in made]))
        return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last)}  # in which convolutions are fastest

    def amount(self, batch: Batch) -> int:
        """Pictures."""
        return len(batch["pixel_values"])

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """Its size as the model gets it."""
        channels, height, width = self.ready(feature)["pixel_values"].shape
        said = [f"{width} x {height} pixels, {channels} channels"]
        return said, [False]


def reading(processor: Any, options: Any) -> Any:
    """The processor as the options want it: reading at another size, or whole pictures where it would cut a part out."""
    cuts = bool(getattr(processor, "do_center_crop", False))
    if not options.size and not (options.whole and cuts):
        return processor
    own = dict(processor.crop_size if cuts else processor.size)
    if not {"height", "width"} <= own.keys():
        raise ConfigError(f"task.size: {type(processor).__name__} makes pictures of no one size ({own}); leave it out")
    wanted = {"height": options.size or own["height"], "width": options.size or own["width"]}
    said: dict[str, Any] = {"size": wanted}
    if cuts and options.whole:
        said["do_center_crop"] = False
    elif cuts:  # as much is cut away as before
        share = options.size / own["height"]
        said = {"crop_size": wanted, "size": {key: round(v * share) for key, v in dict(processor.size).items()}}
    return type(processor).from_dict(processor.to_dict(), **said)


def _stays(module: nn.Module) -> Any:
    """A `train` that leaves the module in evaluation."""
    return lambda mode=True: module
