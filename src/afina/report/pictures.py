"""Pictures of test rows as they stand on the page: small, and part of the file; of masks, those that were met worst."""

from __future__ import annotations

import base64
import colorsys
import io
import os
from pathlib import Path
from typing import Any

from afina.errors import MissingDependencyError
from afina.report.cells import number_in
from afina.report.folder import RunFolder
from afina.report.markup import Markup, cut, el, table
from afina.report.words import counted

__all__ = ["thumbnail", "worst_masks"]

_SIDE = 180  # pixels of the longer one, at most
_SHOWN = 12
_APART = 0.618034  # of the circle of hues between neighbouring classes


def thumbnail(path: str, *, mask: bool = False) -> Markup:
    """The picture with the end of its path below it; the path alone where it is no longer there, or cannot be read here."""
    name = "/".join(Path(path).parts[-2:])
    try:
        picture = _coloured(path) if mask else _picture(path)
    except (ValueError, OSError, MissingDependencyError) as error:
        why = "the file is no longer there" if not os.path.isfile(path) else cut(" ".join(str(error).split()), 120)
        return el("p", cut(path, 280), el("span", f" (not shown: {why})", class_="soft"), class_="text", dir="auto")
    picture.thumbnail((_SIDE, _SIDE))
    held = io.BytesIO()
    picture.save(held, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
    drawn = el("img", src=source, alt=f"the picture {cut(name, 80)}", width=picture.width, height=picture.height)
    return el("figure", drawn, el("figcaption", cut(name, 80), dir="auto", title=path))


def _picture(path: str) -> Any:
    from afina.data.pictures import read_picture

    return read_picture(path)


def _coloured(path: str) -> Any:
    """A mask, each class in a colour of its own; the first black, what has no class grey."""
    import numpy as np
    from PIL import Image

    from afina.data.pictures import read_mask

    hues = [colorsys.hsv_to_rgb(i * _APART % 1, 0.75, 0.95) for i in range(254)]
    colours = np.array([(0, 0, 0), *hues, (0.5, 0.5, 0.5)]) * 255
    return Image.fromarray(colours[np.minimum(read_mask(path), 255)].astype(np.uint8))


def worst_masks(run: RunFolder) -> Markup:
    """How well each class is met, and the rows that are met worst, each with its picture and its mask."""
    each = [(cut(label), "-" if share is None else f"{share:.3f}", f"{run.test['pixels'][label]:,}")
            for label, share in run.test["iou"].items()]  # fmt: skip
    met = table("Intersection over union of each class", ["class", "IoU", "pixels"], each, numbers=(1, 2))
    order = sorted(run.rows, key=lambda row: number_in(row.more.get("mean_iou", "")) or 0.0)[:_SHOWN]
    items = [
        el("li", thumbnail(row.given["image"]), thumbnail(row.given["label"], mask=True),
           el("p", f"mean IoU {row.more.get('mean_iou', '-')} · answered ", el("span", cut(row.answer, 120), dir="auto"),
              f" · line {row.line}", class_="verdict"))
        for row in order
    ]  # fmt: skip
    said = f"The {counted(len(order), 'row')} that are met worst, of {len(run.rows):,}: the picture, and the right mask."
    return el("div", met, el("p", said), el("ol", *items, class_="mistakes seen"))
