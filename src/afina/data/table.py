"""Reads a CSV as people have them: any of four delimiters, a byte order mark, quoted line breaks, spaces around headers,
no header at all, an old encoding, packed by gzip.

What cannot be read for certain is an error that names the row and the column (T41); nothing is guessed in silence, since
a row that is cut at the wrong comma trains a model on half a sentence. What was found out is kept in `Table.notes`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.errors import DataError, Problems, did_you_mean, shortened

__all__ = ["Table", "decoded", "read_bytes", "read_csv"]

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_SAMPLE = 100  # records looked at to find the delimiter
_FIELD_LIMIT = 1 << 26  # characters in one field
# Encodings looked for in a file that is not UTF-8; where several fit as well, the first of them.
_ENCODINGS = (
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "shift_jis", "euc_jp", "gb18030",
    "big5", "euc_kr",
)  # fmt: skip
_CHAOS = 0.4  # most disorder that a decoded text may show, by charset-normalizer's measure
_EQUAL = 0.1  # disorder apart by less than this does not tell one encoding from another


@dataclass
class Table:
    """The records of a file by column, each with the line it begins in (the header is line 1).

    Where a folder holds several files, a line is written `train.csv:12`, and `sides` says which split each row is in.
    """

    path: Path
    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int | str]
    delimiter: str
    encoding: str
    notes: list[str] = field(default_factory=list)  # what was found out, and not told by the file itself
    sides: list[str] | None = None  # train, validation or test, where files say so
    text: str = ""  # the column of the text, where the form of the data says so
    text_pair: str = ""
    label: str = ""
    nested: dict[str, str] = field(default_factory=dict)  # columns with a list or an object in them: where the first is
    running: bool = False  # one row, a text that goes on: it is divided where it stands
    prepared: dict[str, Any] | None = None  # the report of `afina prepare`, where it made the folder

    def missing(self, column: str) -> str | None:
        """What to say of a column that is not there, with the nearest names (T42); None where it is."""
        if column in self.columns:
            return None
        return f"{self.path} has no column {column!r}.{did_you_mean(column, self.columns)}"


def read_csv(path: str | Path, wanted: Iterable[str] = (), *, header: bool = True) -> Table:
    """Read a whole CSV file; `wanted` columns help to tell the delimiter.

    Without a header the columns are called 1, 2, ...; a file whose header has none of the wanted columns, all of them
    numbers, is read so as well. Raises DataError with every row that does not fit the header.
    """
    path = Path(path)
    wanted = set(wanted)
    text, encoding, notes = decoded(path)
    if not text.strip():
        raise DataError(f"{path} is empty")
    csv.field_size_limit(_FIELD_LIMIT)
    delimiter = _delimiter(text, wanted if header else set())
    records = _records(path, text, delimiter, notes)
    columns = [name.strip() for name in records[0][1]]
    if header and wanted and all(re.fullmatch(r"[1-9]\d*", name) for name in wanted) and not wanted & set(columns):
        header = False
        notes.append(f"read as a file without a header, since columns are asked for by number ({shortened(sorted(wanted))})")
    if not header:
        columns = [str(i + 1) for i in range(len(columns))]
        records = [(0, columns), *records]
    problems = Problems(str(path))
    for name in sorted({c for c in columns if columns.count(c) > 1}):
        named = f"column {name!r}" if name else "a column ''"
        problems.add(f"the header names {named} {columns.count(name)} times; rename all but one")
    wrong = [(line, len(fields)) for line, fields in records[1:] if len(fields) != len(columns)]
    whole = "the header" if header else f"line {records[1][0]}"
    for line, found in wrong[:5]:
        problems.add(f"line {line} has {found} fields, {whole} has {len(columns)} ({shortened(columns)})")
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
    return Table(path, columns, rows, [line for line, _ in records[1:]], delimiter, encoding, notes)


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where it ends in .gz; raises DataError where that cannot be had."""
    try:
        if path.suffix.lower() != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; give a CSV file") from None
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is no whole gzip file: {error}. Pack it again, or give it unpacked") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def decoded(path: Path) -> tuple[str, str, list[str]]:
    """The text of a file, its encoding, and what was found out about it. Raises DataError with line and byte."""
    raw = read_bytes(path)
    if raw.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise DataError(f"{path} is a spreadsheet, not a CSV file; save it as CSV (UTF-8) and give that")
    if raw.startswith(b"\x1f\x8b"):
        raise DataError(f"{path} is packed by gzip; let its name end in .gz")
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if raw.startswith(mark)), "utf-8")
    notes: list[str] = []
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        where = f"line {line}, byte {column} is 0x{raw[error.start]:02x}"
        older = _older_encoding(raw) if encoding == "utf-8" else None
        if older is None:
            raise DataError(
                f"{path} is not {encoding}: {where}. Save the file as UTF-8, or "
                f"convert it, for example: iconv -f windows-1252 -t utf-8 {path.name} > utf8.csv"
            ) from None
        text, encoding = raw.decode(older), older
        notes.append(f"read as {older}, since the file is not UTF-8 ({where}); look whether its special letters are right")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line} holds a zero byte, so this is not a text file (UTF-16 without its mark?)")
    return text, encoding, notes


def _older_encoding(raw: bytes) -> str | None:
    """The encoding of a file that is not UTF-8; None where it is UTF-8 broken in places, or nothing fits."""
    from charset_normalizer import from_bytes

    broken = raw.decode("utf-8", errors="replace")
    if sum(letter > "\x7f" and letter != "\ufffd" for letter in broken) > broken.count("\ufffd"):
        return None
    special = b"\n".join(line for line in raw.splitlines() if not line.isascii())[:200_000]
    found = {match.encoding: match for match in from_bytes(special, cp_isolation=list(_ENCODINGS), threshold=_CHAOS)}
    fitting = []
    for name in _ENCODINGS:
        try:
            raw.decode(name)
        except UnicodeDecodeError:
            continue
        if name in found:
            fitting.append(name)
    least = min((found[name].chaos for name in fitting), default=0.0)
    chosen = next((name for name in fitting if found[name].chaos <= least + _EQUAL), None)
    # encodings share most of their letters: of those that read the file alike, the usual one is named
    return next((name for name in _ENCODINGS[:2] if chosen and raw.decode(name, "replace") == raw.decode(chosen)), chosen)


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


def _records(path: Path, text: str, delimiter: str, notes: list[str]) -> list[tuple[int, list[str]]]:
    """Records that are not blank, with the lines they begin in.

    Files with tabs are often written without quoting, so that a quote is a letter like any other: where every line fits
    only when read so, it is.
    """
    if delimiter != "\t" or '"' not in text:
        return _parsed(path, text, delimiter, csv.QUOTE_MINIMAL)
    plain = _parsed(path, text, delimiter, csv.QUOTE_NONE)
    fits = len({len(fields) for _, fields in plain}) == 1
    try:
        quoted = _parsed(path, text, delimiter, csv.QUOTE_MINIMAL)
    except DataError:
        if not fits:
            raise
        quoted = []
    if not fits or len(quoted) == len(plain):
        return quoted
    notes.append("double quotes are read as they stand: between tabs, every line fits only so")
    return plain


def _parsed(path: Path, text: str, delimiter: str, quoting: Any) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, quoting=quoting)
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
