"""Reads whatever people keep labelled texts in, into one `Table`: CSV, TSV, JSON, JSON Lines, Parquet, folders.

A folder is either one subfolder of text files a class (`spam/17.txt`), or one file a split (`train.csv`, `val.csv`,
`test.csv`). Parquet needs pyarrow, which comes with `afina[data]`; it is read batch by batch. `datasets` is not used: it
is five times as heavy, and would guess types and headers in silence.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from afina.data.example import ROLES
from afina.data.media import Medium, folder_of_classes
from afina.data.rows import Rows
from afina.data.table import Form, Table, checked_encoding, decoded, open_text, read_csv
from afina.errors import DataError, MissingDependencyError, Problems, shortened

__all__ = ["NAMES", "REPORT", "SPLITS", "from_objects", "join_sides", "read_table"]

SPLITS = ("train", "validation", "test")
REPORT = "data_report.json"
NAMES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test",
}  # fmt: skip
ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet")
_WRONG = 5  # rows named in an error


def read_table(
    path: str | Path, wanted: Iterable[str] = (), *, form: Form | None = None, read: Callable[[Path], Any] | None = None,
    media: Mapping[str, Medium] | None = None,
) -> Table:  # fmt: skip
    """The table in a file or folder, by its ending; anything else is read as CSV.

    `form` says what is known of a text file; `wanted` columns help to tell a delimiter. `read` knows a form of file of its
    own: it is asked first, and returns None where a file is of no such form. `media`: kinds of files that rows name, by
    role; a folder may hold them in a subfolder for each class. Lists and objects in JSON become JSON text, and
    `Table.nested` says where they are.
    Raises DataError with all that cannot be read, MissingDependencyError for Parquet without pyarrow.
    """
    path, wanted, form = Path(path), set(wanted), form or Form()
    if read is not None and path.exists() and (table := read(path)) is not None:
        return table  # type: ignore[no-any-return]
    if path.is_dir():
        return _read_folder(path, wanted, form, read, media or {})
    ending = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        return _read_json_lines(path, form)
    if ending == ".json":
        return _read_json(path, form)
    if ending == ".parquet":
        return _read_parquet(path)
    return read_csv(path, wanted, form=form)


# --- JSON


def _read_json_lines(path: Path, form: Form) -> Table:
    notes: list[str] = []
    encoding = checked_encoding(path, form, notes)
    problems = Problems(str(path))
    begins = ""

    def parsed() -> Iterator[tuple[int, Any]]:
        nonlocal begins
        with open_text(path, encoding, newline="\n") as text:
            for line, content in enumerate(text, 1):
                begins = begins or content.strip()[:1]
                if content.strip():
                    try:
                        yield line, json.loads(content)
                    except (json.JSONDecodeError, RecursionError) as error:
                        problems.add(f"line {line}{_json_place(error, with_line=False)}")

    table = from_objects(path, parsed(), encoding, notes, "line", problems)
    if problems.found and not table.rows and begins in ("[", "{"):
        raise DataError(f"{path}: no line is JSON by itself. If the whole file is one JSON value, let its name end in .json")
    _raise_first(problems)
    return table


def _read_json(path: Path, form: Form) -> Table:
    text, encoding, notes = decoded(path, form.encoding)
    if not text.strip():
        raise DataError(f"{path} is empty; give a file with a list of rows")
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        first, _, rest = text.strip().partition("\n")
        try:
            if rest and isinstance(json.loads(first), dict):
                return _read_json_lines(path, form)
        except json.JSONDecodeError:
            pass
        raise DataError(f"{path} is not valid JSON{_json_place(error)}") from None
    if isinstance(content, Mapping):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        rows = [key for key, value in lists.items() if value and all(isinstance(row, Mapping) for row in value)]
        if len(rows) == 1:
            notes.append(f"the rows are read from the key {rows[0]!r}")
            content = lists[rows[0]]
        elif lists and len(lists) == len(content) and len({len(value) for value in lists.values()}) == 1:
            content = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        else:
            raise DataError(
                f"{path} holds one object with the keys {shortened(content) or '(none)'}; expected a list of rows, "
                '[{"text": ..., "label": ...}, ...], or a list of values for each column'
            )
    if not isinstance(content, list):
        raise DataError(f"{path} holds {type(content).__name__} {str(content)[:40]!r}; expected a list of rows")
    return from_objects(path, enumerate(content, 1), encoding, notes, "row")


def _json_place(error: Exception, *, with_line: bool = True) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return ": it is nested too deeply"
    return f"{f', line {error.lineno}' if with_line else ''}, column {error.colno}: {error.msg}"


def from_objects(
    path: Path, found: Iterable[tuple[int, Any]], encoding: str, notes: list[str], unit: str,
    problems: Problems | None = None,
) -> Table:  # fmt: skip
    """Rows of text from objects; a value that is a list or an object is kept as JSON, and noted.

    What is no object is told by DataError, or where `problems` come with it, added to them.
    """
    told = problems or Problems(str(path))
    rows, lines = Rows([]), list[int | str]()
    places: dict[str, int] = {}
    nested: dict[str, str] = {}
    for line, row in found:
        if not isinstance(row, Mapping):
            told.add(f"{unit} {line} is {json.dumps(row)[:40]}; expected an object with a value for each column")
            continue
        values = {str(key).strip(): value for key, value in row.items()}
        for name, value in values.items():
            if name not in places:
                places[name] = len(places)
                rows.add_column(name)
            if isinstance(value, list | dict):
                nested.setdefault(name, f"{unit} {line}, column {name!r} is {_plain(value)[:40]}")
        rows.append(_plain(values.get(name)) for name in places)
        lines.append(line)
    if not told.found and not rows:
        raise DataError(f"{path} has no rows; give a file with an object for each row")
    if problems is None:
        _raise_first(told)
    return Table(path, list(places), rows, lines, "", encoding, notes, nested=nested)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _raise_first(problems: Problems) -> None:
    """Raise with the first few problems and a count of the rest."""
    more = len(problems.found) - _WRONG
    del problems.found[_WRONG:]
    problems.raise_as(DataError, f"{more} more rows are like that." if more > 0 else "")


# --- Parquet


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingDependencyError("pyarrow", "data", "reading Parquet files") from None
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=10_000)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            return from_objects(path, enumerate(rows, 1), "utf-8", [], "row")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole Parquet file: {str(error).splitlines()[0]}") from None


# --- folders


def _read_folder(
    folder: Path, wanted: set[str], form: Form, read: Callable[[Path], Any] | None, media: Mapping[str, Medium]
) -> Table:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    sides: dict[str, Path] = {}
    for file in files:
        stem, _, ending = file.name.lower().removesuffix(".gz").rpartition(".")
        if stem in NAMES and (f".{ending}" in ENDINGS or read is not None):
            if NAMES[stem] in sides:
                two = f"{sides[NAMES[stem]].name} and {file.name}"
                raise DataError(f"{folder} holds two {NAMES[stem]} files, {two}; keep one")
            sides[NAMES[stem]] = file
    if "train" in sides:
        return _read_splits(folder, sides, wanted, form, read)
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and any(p.glob("*.txt")))
    if classes and not media:
        return _read_texts(folder, classes)
    for role, medium in media.items():
        listed = next((p for p in files if p.stem.lower() == "metadata" and p.suffix.lower() in ENDINGS), None)
        if listed is not None:
            return read_table(listed, wanted, form=form, read=read)
        if (found := folder_of_classes(folder, medium, role)) is not None:
            return found
    if media:
        first = next(iter(media.values()))
        here = shortened(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise DataError(
            f"{folder} is a folder that holds {here}; expected a subfolder of {first.name}s for each class, with train and "
            f"test above them or not, or a CSV file of paths and labels ({first.name}s end in {shortened(first.endings)})"
        )
    here = shortened(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise DataError(
        f"{folder} is a folder that holds {here}; expected a file, train and test files (train.csv, test.csv), or a "
        "subfolder of .txt files for each class"
    )


def _read_splits(
    folder: Path, files: dict[str, Path], wanted: set[str], form: Form, read: Callable[[Path], Any] | None
) -> Table:
    prepared = None
    if (folder / REPORT).is_file():
        try:
            prepared = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            prepared = prepared if prepared.get("prepared_by") == "afina prepare" else None
            if prepared is not None and not isinstance(prepared.get("columns"), Mapping):
                raise ValueError("it does not say which columns are used")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{folder / REPORT} is no report of `afina prepare`: {error}") from None
    if prepared is not None:
        wanted = wanted or set(prepared["columns"].values())
    tables = {side: read_table(files[side], wanted, form=form, read=read) for side in SPLITS if side in files}
    joined = join_sides(folder, tables, {side: files[side].name for side in tables}, wanted)
    joined.prepared = prepared
    first = tables["train"]
    said = prepared["columns"] if prepared is not None else {role: getattr(first, role) for role in ROLES}
    for role, column in said.items():
        setattr(joined, role, column)
    return joined


def join_sides(path: Path, tables: Mapping[str, Table], names: Mapping[str, str], wanted: set[str]) -> Table:
    """Tables of sides as one, with the columns of train; a line becomes `train.csv:12`. Raises DataError for what lacks."""
    first = tables["train"]
    problems = Problems(str(path))
    for side, table in tables.items():
        lacking = [name for name in first.columns if name not in table.columns and (not wanted or name in wanted)]
        if lacking:
            problems.add(
                f"{names[side]} lacks the column {shortened(map(repr, lacking))} of {names['train']}; "
                f"it has {shortened(table.columns)}"
            )
    problems.raise_as(DataError)
    joined = Table(path, first.columns, Rows(first.columns), [], first.delimiter, first.encoding, sides=[])
    for side, table in tables.items():
        joined.rows += ({name: row.get(name, "") for name in first.columns} for row in table.rows)
        joined.lines += [f"{names[side]}:{line}" for line in table.lines]
        joined.notes += [f"{names[side]}: {note}" for note in table.notes]
        joined.nested = {**table.nested, **joined.nested}
        assert joined.sides is not None
        joined.sides += [side] * len(table.rows)
    return joined


def _read_texts(folder: Path, classes: list[Path]) -> Table:
    columns = ["text", "label", "file"]
    table = Table(folder, columns, Rows(columns), [], "", "utf-8", text="text", label="label")
    for place in classes:
        for file in sorted(place.glob("*.txt")):
            name = f"{place.name}/{file.name}"
            text, encoding, _ = decoded(file)
            if not encoding.startswith("utf"):
                table.notes.append(f"{name} is read as {encoding}, since it is not UTF-8")
            table.rows.append((text, place.name, name))
            table.lines.append(name)
    return table
