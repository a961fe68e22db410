"""Files that a column names: pictures, recordings. What reading, cleaning and dividing must know of them.

A `Medium` is one kind of such files. Every file is opened and read to its end before anything is trained, so that what is
broken is told together, with the names, and two rows whose files hold the same are known to be the same row (T27): the
digest of what a file holds stands for it wherever texts would be compared. Nothing of a file is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from afina.data.rows import Rows
from afina.data.table import Table
from afina.errors import DataError, shortened

__all__ = ["SIDES", "Look", "Medium", "folder_of_classes", "locate", "looks_at"]

_THREADS = 4
SIDES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test", "testing": "test"}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What was seen in one file: a digest of what it holds, and kinds of things that are to be told, such as "turned"."""

    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Medium:
    """A kind of files. `look` reads one to its end and raises ValueError saying what is wrong with it."""

    name: str  # of one file, for a person: picture, recording
    endings: tuple[str, ...]  # that files in folders have
    look: Callable[[Path], Look]
    check: Callable[[], None] = lambda: None  # raises MissingDependencyError where a library is lacking


def looks_at(paths: Sequence[str], medium: Medium) -> dict[str, Look | str]:
    """What each file holds, or what is wrong with it, several at a time."""
    medium.check()

    def look(path: str) -> Look | str:
        try:
            if not Path(path).is_file():
                return "there is no such file"
            return medium.look(Path(path))
        except (ValueError, OSError) as error:
            return " ".join(str(error).split()) or type(error).__name__

    once = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(once, pool.map(look, once), strict=True))


# --- where files are


def folder_of_classes(folder: Path, medium: Medium, role: str) -> Table | None:
    """The files of a folder with a subfolder for each class, in folders of sides or not; None where there are none.

    `train/apple/1.png` and `apple/1.png` are both read; a line is called by its path below the folder. Raises DataError for
    a file that lies where no class is said.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in medium.endings and not _hidden(p, folder))
    found = [p for p in found if p.is_file()]
    if not found:
        return None
    places = [p.relative_to(folder).parts for p in found]
    divided = all(len(parts) > 1 and parts[0].lower() in SIDES for parts in places)
    wrong = [str(p.relative_to(folder)) for p, parts in zip(found, places, strict=True) if len(parts) != 2 + divided]
    if wrong:
        form = "SIDE/CLASS/FILE" if divided else "CLASS/FILE, or in all of train/CLASS/FILE, test/CLASS/FILE"
        raise DataError(
            f"{folder}: expected every {medium.name} at {form}; {len(wrong)} of {len(found)} lie elsewhere: "
            f"{shortened(wrong, 5)}. Move them, or list paths and labels in a CSV file"
        )
    columns = [role, "label"]
    table = Table(folder, columns, Rows(columns), [], "", "", label="label")
    setattr(table, role, role)
    table.sides = [] if divided else None
    for path, parts in zip(found, places, strict=True):
        table.rows.append((str(path.absolute()), parts[-2]))
        table.lines.append("/".join(parts))
        if table.sides is not None:
            table.sides.append(SIDES[parts[0].lower()])
    others = sorted({p.suffix.lower() or p.name for p in folder.rglob("*") if p.is_file() and not _hidden(p, folder)}
                    - set(medium.endings))  # fmt: skip
    if others:
        table.notes.append(f"files that end in {shortened(others, 6)} are no {medium.name}s and are not read")
    if table.sides is not None and "train" not in table.sides:
        raise DataError(f"{folder} has no folder train; it has {shortened(sorted({parts[0] for parts in places}))}")
    return table


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)


def locate(table: Table, columns: Iterable[str]) -> None:
    """Make the paths in these columns whole: they are written relative to the file that names them."""
    folder = table.path if table.path.is_dir() else table.path.parent
    for name in columns:
        if name in table.columns:
            cells = (cell.strip() for cell in table.rows.column(name))
            table.rows.put(name, [str((folder / Path(cell).expanduser()).absolute()) if cell else "" for cell in cells])
