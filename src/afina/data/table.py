"""Reads a CSV as people have them: any of four delimiters, a byte order mark, quoted line breaks, spaces around headers.

What cannot be read for certain is an error that names the row and the column (T41); nothing is guessed in silence, since
a row that is cut at the wrong comma trains a model on half a sentence.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from afina.errors import DataError, Problems, did_you_mean, shortened

__all__ = ["Table", "read_csv"]

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_SAMPLE = 100  # records looked at to find the delimiter
_FIELD_LIMIT = 1 << 26  # characters in one field


@dataclass
class Table:
    """The records of a file by column, each with the line it begins in (the header is line 1)."""

    path: Path
    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]
    delimiter: str
    encoding: str

    def missing(self, column: str) -> str | None:
        """What to say of a column that is not there, with the nearest names (T42); None where it is."""
        if column in self.columns:
            return None
        return f"{self.path} has no column {column!r}.{did_you_mean(column, self.columns)}"


def read_csv(path: str | Path, wanted: Iterable[str] = ()) -> Table:
    """Read a whole CSV file with a header row; `wanted` columns help to tell the delimiter.

    Raises DataError with every row that does not fit the header.
    """
    path = Path(path)
    text, encoding = _decoded(path)
    if not text.strip():
        raise DataError(f"{path} is empty")
    csv.field_size_limit(_FIELD_LIMIT)
    delimiter = _delimiter(text, set(wanted))
    records = _records(path, text, delimiter)
    columns = [name.strip() for name in records[0][1]]
    problems = Problems(str(path))
    for name in sorted({c for c in columns if columns.count(c) > 1}):
        problems.add(f"the header names column {name!r} {columns.count(name)} times; rename all but one")
    wrong = [(line, len(fields)) for line, fields in records[1:] if len(fields) != len(columns)]
    for line, found in wrong[:5]:
        problems.add(f"line {line} has {found} fields, the header has {len(columns)} ({shortened(columns)})")
    cure = ""
    if wrong:
        rest = f"{len(wrong) - 5} more lines are like that. " if len(wrong) > 5 else ""
        cure = (
            f"{rest}The fields are separated by a {DELIMITERS[delimiter]}: where a text holds one itself, put the whole "
            'text in double quotes ("...").'
        )
    problems.raise_as(DataError, cure)
    if len(records) == 1:
        raise DataError(f"{path} has a header ({shortened(columns)}) and no rows")
    rows = [dict(zip(columns, fields, strict=True)) for _, fields in records[1:]]
    return Table(path, columns, rows, [line for line, _ in records[1:]], delimiter, encoding)


def _decoded(path: Path) -> tuple[str, str]:
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; give a CSV file") from None
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if raw.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise DataError(f"{path} is a spreadsheet, not a CSV file; save it as CSV (UTF-8) and give that")
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise DataError(
            f"{path} is not {encoding}: line {line}, byte {column} is 0x{raw[error.start]:02x}. Save the file as UTF-8, or "
            f"convert it, for example: iconv -f windows-1252 -t utf-8 {path.name} > utf8.csv"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line} holds a zero byte, so this is not a text file (UTF-16 without its mark?)")
    return text, encoding


def _delimiter(text: str, wanted: set[str]) -> str:
    """The delimiter under which most wanted columns exist, most rows fit the header, and the columns are most."""

    def score(delimiter: str) -> tuple[int, float, int]:
        sample: list[list[str]] = []
        try:
            for fields in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
                if fields:
                    sample.append(fields)
                if len(sample) > _SAMPLE:
                    break
        except csv.Error:
            pass  # said with its line once the delimiter is known
        if not sample:
            return (0, 0.0, 0)
        header = sample[0]
        fitting = sum(len(fields) == len(header) for fields in sample) / len(sample)
        return (len({name.strip() for name in header} & wanted), fitting if len(header) > 1 else 0.0, len(header))

    return max(DELIMITERS, key=score)


def _records(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Records that are not blank, with the lines they begin in."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[int, list[str]]] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return records
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"{path}: a quoted text that begins in line {line} is never closed; add the missing quote"
                ) from None
            raise DataError(
                f'{path}, line {reader.line_num}: {error}. A quote within a quoted text is written twice ("")'
            ) from None
        if any(field.strip() for field in fields):
            records.append((line, fields))
