"""Boxes of words on a page, brought to the grid on which models of documents were trained: 0 to 1000 either way.

A row says its boxes as `[[x0, y0, x1, y1], ...]`, one a word, from the upper left corner. Whether those numbers are pixels
or thousandths of the page cannot be seen from them (a page of 762 by 1000 pixels has boxes that would pass for either), so
the recipe says it, and what contradicts it is an error. Numbers are rounded down, as in published preparations of FUNSD.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from afina.errors import shortened

__all__ = ["GRID", "UNITS", "Box", "read_boxes", "read_size"]

GRID = 1000
UNITS = ("pixels", "thousandths")
Box = tuple[int, int, int, int]
_SHOWN = 3  # words named in an error


def read_size(cell: str) -> tuple[float, float]:
    """Width and height in a cell, `[762, 1000]` or `762 x 1000`. Raises ValueError where it says neither."""
    try:
        values = json.loads(cell) if cell.startswith("[") else [float(part) for part in cell.lower().split("x")]
        if len(values) == 2 and all(_number(value) and value > 0 for value in values):
            return values[0], values[1]
    except (ValueError, TypeError):
        pass
    raise ValueError(f"the size of the page is {cell[:40]!r}; expected [width, height] in pixels")


def read_boxes(
    cell: str, words: Sequence[str], unit: str, size: tuple[float, float] | None, *, clip: bool = False
) -> tuple[list[Box], int]:
    """The boxes in a cell, one a word, in thousandths of the page, and how many were cut at its edges.

    `unit` is one of `UNITS`; `size`: of the page in pixels, needed where boxes are in them. `clip` cuts boxes that reach
    over the edge. Raises ValueError naming the words whose boxes cannot be.
    """
    try:
        found = json.loads(cell)
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ValueError(f"the boxes are {cell[:40]!r}; expected a list of [x0, y0, x1, y1], one a word")
    if len(found) != len(words):
        raise ValueError(f"{len(words)} words and {len(found)} boxes; expected a box for each word")
    if unit == "pixels" and size is None:
        raise ValueError(
            "boxes are in pixels, and nothing says how large the page is; name its picture (column image) or its size "
            "(column page_size, [width, height])"
        )
    width, height = (GRID, GRID) if unit == "thousandths" or size is None else size
    wrong, beyond = [], []
    boxes, cut = list[Box](), 0
    for number, (word, box) in enumerate(zip(words, found, strict=True), 1):
        name = f"word {number} ({word[:20]!r}) has {json.dumps(box)[:60]}"
        if not isinstance(box, list) or len(box) != 4 or not all(_number(value) for value in box):
            wrong.append(f"{name}, which is no [x0, y0, x1, y1]")
            continue
        x0, y0, x1, y1 = box
        if x1 < x0 or y1 < y0:
            wrong.append(f"{name}, which ends {'left of' if x1 < x0 else 'above'} where it begins")
            continue
        sides = (width, height, width, height)
        inside = [min(max(value, 0), side) for value, side in zip(box, sides, strict=True)]
        if inside != [x0, y0, x1, y1]:
            beyond.append(name)
            cut += 1
        x0, y0, x1, y1 = (int(GRID * value / side) for value, side in zip(inside, sides, strict=True))
        boxes.append((x0, y0, x1, y1))
    if wrong:
        raise ValueError(shortened(wrong, _SHOWN))
    if beyond and not clip:
        page = f"{width:g} x {height:g} {'thousandths' if unit == 'thousandths' else 'pixels'}"
        meant = (
            "say task.boxes=pixels if that is what they are" if unit == "thousandths"
            else "say task.boxes=thousandths if they are already 0 to 1000"
        )  # fmt: skip
        many = "box lies" if len(beyond) == 1 else "boxes lie"
        raise ValueError(
            f"{len(beyond)} {many} outside the page of {page}: {shortened(beyond, _SHOWN)}; {meant}, or cut them at the "
            "edge of the page with task.clip=true"
        )
    return boxes, cut


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
