"""Pages whose words were tagged wrongly, with the boxes of those words drawn on them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from afina.data.boxes import GRID, Box, read_boxes, read_size
from afina.data.pictures import picture_size, read_picture
from afina.errors import MissingDependencyError
from afina.report.cells import Tagged
from afina.report.folder import Row, RunFolder
from afina.report.marked import mistaken_tags
from afina.report.markup import Markup, cut, el
from afina.tasks.entities import Entity

__all__ = ["mistaken_pages"]

_SHOWN = 6  # pages, which are the largest part of the file
_SIDE = 800  # pixels of the longer one, at most
_BLANK = (0.77, 1.0)  # of a page without a picture, where nothing says its form
_MISSED, _EXTRA = (26, 95, 180), (200, 40, 20)


def mistaken_pages(run: RunFolder) -> Markup:
    """The pages with most mistakes, each with the boxes of the words that are missed or answered wrongly."""
    said = el("p", "On the pages, boxes of words that are missed are blue, of those answered wrongly red.", class_="note")
    return el("div", said, mistaken_tags(run, lambda *of: _page(run, *of), _SHOWN))


def _page(run: RunFolder, row: Row, said: Tagged, missed: Sequence[Entity], extra: Sequence[Entity]) -> Markup:
    """The page; only the reason where it cannot be drawn."""
    try:
        drawn = _drawn(run, row, said, missed, extra)
    except (ValueError, OSError, MissingDependencyError) as error:
        return el("p", f"(the page is not shown: {cut(' '.join(str(error).split()), 120)})", class_="soft")
    held = io.BytesIO()
    drawn.save(held, "JPEG", quality=70)
    source = f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
    alt = f"the page of line {cut(row.line, 60)}, with {len(missed)} missed and {len(extra)} wrong entities marked"
    return el("figure", el("img", src=source, alt=alt, width=drawn.width, height=drawn.height))


def _drawn(run: RunFolder, row: Row, said: Tagged, missed: Sequence[Entity], extra: Sequence[Entity]) -> Any:
    """The picture of the page, or its words on a blank one."""
    from PIL import ImageDraw

    options = run.metrics["task"].get("options", {})
    path, size = row.given.get("image", ""), row.given.get("page_size", "")
    known = picture_size(path) if path else read_size(size) if size else None
    boxes = read_boxes(row.given.get("boxes", ""), said.words, options.get("boxes", ""), known, clip=True)[0]
    page = read_picture(path) if path else _blank(said.words, boxes, known)
    page.thumbnail((_SIDE, _SIDE))
    draw = ImageDraw.Draw(page)
    for entities, colour, apart in ((missed, _MISSED, 1), (extra, _EXTRA, 3)):
        for _, first, last in entities:
            for box in boxes[first:last]:
                draw.rectangle(_placed(box, page.size, apart), outline=colour, width=2)
    return page


def _placed(box: Box, size: tuple[int, int], apart: int) -> tuple[float, float, float, float]:
    """A box on a picture of this size, so many pixels larger to each side."""
    x0, y0, x1, y1 = (value * side / GRID for value, side in zip(box, size * 2, strict=True))
    return x0 - apart, y0 - apart, x1 + apart, y1 + apart


def _blank(words: Sequence[str], boxes: Sequence[Box], known: tuple[float, float] | None) -> Any:
    """A page with the words where they stand."""
    from PIL import Image, ImageDraw

    width, height = known or _BLANK
    share = _SIDE / max(width, height)
    page = Image.new("RGB", (max(1, round(width * share)), max(1, round(height * share))), "white")
    draw = ImageDraw.Draw(page)
    for word, box in zip(words, boxes, strict=True):
        x, y, _, lower = _placed(box, page.size, 0)
        draw.text((x, y), cut(word, 40), fill=(90, 90, 90), font_size=min(40, max(8, round(lower - y))))
    return page
