"""Running text divided where it stands: one part of the book trains, the next chooses, the last tests."""

from __future__ import annotations

import re
from dataclasses import replace

from afina.data.read import SPLITS
from afina.data.table import Table
from afina.errors import DataError

__all__ = ["stretched"]


def stretched(table: Table, *, validation: float, test: float) -> Table:
    """The one text of a table as three rows, a side each; put together they are the text, but for white space between.

    Cuts are at the end of the paragraph (else line, else word) that is nearest to the share asked for, in characters.
    """
    column = table.columns[0]
    text = table.rows[0][column]
    cuts = [_nearest_end(text, round(len(text) * share)) for share in (1 - validation - test, 1 - test)]
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    if not all(part.strip() for part in parts):
        raise DataError(f"{table.path} holds {len(text)} characters, which is too short to be divided in three")
    lines: list[int | str] = []
    for begin, part in zip([0, *cuts], parts, strict=True):
        lines.append(text.count("\n", 0, begin + len(part) - len(part.lstrip())) + 1)
    said = ", ".join(f"{name} from line {line}" for name, line in zip(SPLITS, lines, strict=True))
    notes = [*table.notes, f"running text, divided where it stands: {said}"]
    rows = [{column: part} for part in parts]
    return replace(table, rows=rows, lines=lines, notes=notes, sides=list(SPLITS), running=False)


def _nearest_end(text: str, place: int) -> int:
    for pattern in (r"\n\s*\n", r"\n", r"\s"):
        ends = [m.end() for m in re.finditer(pattern, text) if abs(m.end() - place) < max(len(text) // 50, 1)]
        if ends:
            return min(ends, key=lambda end: abs(end - place))
    return place
