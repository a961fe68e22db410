"""Data sets of the hub, by name, through `datasets`: hub:NAME, hub:NAME:CONFIGURATION, or OWNER/NAME.

Its rows come batch by batch from Arrow files that `datasets` keeps on the disk; numbers of a class become their names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from afina.data.read import NAMES, SPLITS, from_objects, join_sides
from afina.data.table import Table
from afina.errors import DataError, MissingDependencyError, shortened

__all__ = ["is_hub", "read_hub"]

_MARK = "hub:"
_OWNED = re.compile(r"[\w-]+/[\w-]+")  # a name with an ending is a file


def is_hub(place: str) -> bool:
    """Whether a place names a data set of the hub and no file: hub:NAME, or OWNER/NAME where there is no such file."""
    return place.startswith(_MARK) or (bool(_OWNED.fullmatch(place)) and not Path(place).exists())


def read_hub(place: str) -> Table:
    """The table of a data set; its train, validation and test rows stay on their sides.

    Raises MissingDependencyError without `datasets`, DataError where there is no such data set.
    """
    try:
        import datasets
    except ImportError:
        hub = "reading data sets of the hub"
        what = hub if place.startswith(_MARK) else f"there is no file {place}, and {hub}"
        raise MissingDependencyError("datasets", "data", what) from None
    name, _, configuration = place.removeprefix(_MARK).partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library raises whatever its network and file layers raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        cure = "a data set is named hub:NAME or hub:NAME:CONFIGURATION"
        raise DataError(f"{place} is no file, and cannot be read from the hub: {said[0]} ({cure})") from None
    sides = {NAMES[split.lower()]: rows for split, rows in found.items() if split.lower() in NAMES}
    if "train" not in sides:
        raise DataError(f"{place} has no train rows; it has {shortened(found)}")
    tables = {side: _table(place, side, sides[side]) for side in SPLITS if side in sides}
    if set(tables) == {"train"}:
        return tables["train"]
    return join_sides(Path(place), tables, {side: side for side in tables}, set())


def _table(place: str, side: str, rows: Any) -> Table:
    """Rows with the names of classes in the place of their numbers."""
    names = {column: feature.names for column, feature in rows.features.items() if hasattr(feature, "names")}

    def named(row: dict[str, Any]) -> dict[str, Any]:
        for column, known in names.items():
            number = row[column]
            row[column] = known[number] if isinstance(number, int) and 0 <= number < len(known) else None
        return row

    return from_objects(Path(place), ((i, named(row)) for i, row in enumerate(rows, 1)), "utf-8", [], "row")
