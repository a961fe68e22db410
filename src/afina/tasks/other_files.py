"""Reads the rows of a recipe, and says where they are pictures or recordings and the task reads texts.

A folder of pictures is refused as a folder of texts, and a column of paths would be learned from letter by letter; both come
of a task that was not named, so the answer names the tasks that read such files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from afina.data.columns import columns_of
from afina.data.example import Kind
from afina.data.media import Medium
from afina.data.options import DataOptions
from afina.data.sources import read_rows
from afina.data.table import Table
from afina.errors import DataError
from afina.tasks.catalogue import tasks

__all__ = ["rows_of"]

_ENTRIES = 20_000  # of a folder that are looked at
_CELLS = 50  # of a column


@dataclass
class Readers:
    """A medium, the tasks that give its files a class, and all that label them."""

    medium: Medium
    classes: list[str] = field(default_factory=list)
    labelled: list[str] = field(default_factory=list)


def rows_of(options: DataOptions, kind: Kind, spell: Callable[[str], str] = str) -> Table:
    """As `read_rows`; raises DataError also where a column that is read as text holds paths of pictures or recordings."""
    others = _others(kind)
    try:
        table = read_rows(options, kind)
    except DataError as error:
        if hint := _in_folder(Path(options.file), others, spell):
            raise DataError(f"{error}. {hint}") from None
        raise
    if not kind.media and (wrong := _in_cells(table, kind, options, others, spell)):
        raise DataError(wrong)
    return table


def _others(kind: Kind) -> dict[str, Readers]:
    """By ending of a file: who reads it, for the media that this kind does not read."""
    own = {medium.name for medium in kind.media.values()}
    found: dict[str, Readers] = {}
    for name, task in tasks().items():
        medium = task.kind.columns[task.kind.input].medium
        if medium is None or medium.name in own or task.kind.labels == "none":
            continue
        readers = found.get(medium.endings[0], Readers(medium))
        readers.labelled.append(name)
        if task.kind.labels == "class":
            readers.classes.append(name)
        found |= dict.fromkeys(medium.endings, readers)
    return found


def _in_folder(folder: Path, others: Mapping[str, Readers], spell: Callable[[str], str]) -> str | None:
    """What to say of a folder that holds such files."""
    if not folder.is_dir():
        return None
    file = next((p for p in islice(folder.rglob("*"), _ENTRIES) if p.suffix.lower() in others), None)
    if file is None:
        return None
    readers = others[file.suffix.lower()]
    listed = any(p.stem.lower() == "metadata" for p in folder.iterdir())
    named = _named(readers.labelled if listed else readers.classes, spell)
    return f"It holds {readers.medium.name}s ({file.relative_to(folder)}); for those say {named}"


def _in_cells(
    table: Table, kind: Kind, options: DataOptions, others: Mapping[str, Readers], spell: Callable[[str], str]
) -> str | None:
    """What to say of a table whose text, or where none is named any column, is nothing but paths of such files."""
    named = columns_of(table, kind, options)[kind.input]
    place = table.path if table.path.is_dir() else table.path.parent
    for column in [named] if named in table.columns else [] if named else table.columns:
        cells = [cell.strip() for cell in islice(table.rows.column(column), _CELLS)]
        if cells and all(Path(c).suffix.lower() in others and (place / Path(c).expanduser()).is_file() for c in cells):
            readers = others[Path(cells[0]).suffix.lower()]
            what = f"{readers.medium.name}s"
            return (
                f"{table.path}: the column {column!r} holds paths of {what} ({cells[0]}), which would be read as letters; "
                f"to read the {what}, say {_named(readers.labelled, spell)}"
            )
    return None


def _named(names: Iterable[str], spell: Callable[[str], str]) -> str:
    asked = spell("task.name")
    return " or ".join(f"{asked} {name}" if asked.startswith("-") else f"{asked}={name}" for name in names)
