"""A folder of files that are named by side of the split (`train`, `dev`, `test`), in a form of file of a task's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from afina.data.read import NAMES, SPLITS
from afina.data.table import Table
from afina.errors import DataError, Problems, shortened

__all__ = ["read_sides"]


def read_sides(folder: Path, read: Callable[[Path], Table | None]) -> Table | None:
    """The files as one table that says which side each row is on; lines become `train.conll:12`.

    None where there is no train file, or a file is of another form. Raises DataError where the files do not go together.
    """
    sides: dict[str, Table] = {}
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.stem.lower() in NAMES):
        side, table = NAMES[file.stem.lower()], read(file)
        if table is None:
            return None
        if side in sides:
            raise DataError(f"{folder} holds two {side} files, {sides[side].path.name} and {file.name}; keep one")
        sides[side] = table
    if "train" not in sides:
        return None
    first = sides["train"]
    problems = Problems(str(folder))
    for table in sides.values():
        if table.columns != first.columns:
            here, there = shortened(table.columns), shortened(first.columns)
            problems.add(f"{table.path.name} has the columns {here}; {first.path.name} has {there}")
    problems.raise_as(DataError)
    joined = Table(
        folder, first.columns, [], [], first.delimiter, first.encoding, text=first.text, label=first.label, sides=[]
    )  # fmt: skip
    assert joined.sides is not None
    for side in (side for side in SPLITS if side in sides):
        table = sides[side]
        joined.rows += table.rows
        joined.lines += [f"{table.path.name}:{line}" for line in table.lines]
        joined.notes += [f"{table.path.name}: {note}" for note in table.notes]
        joined.sides += [side] * len(table.rows)
    return joined
