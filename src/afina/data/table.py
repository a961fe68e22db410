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
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from afina.data.options import DELIMITERS as OF_NAME
from afina.data.rows import Rows
from afina.errors import DataError, Problems, did_you_mean, shortened

__all__ = ["Form", "Table", "checked_encoding", "decoded", "open_text", "read_bytes", "read_csv"]

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_CHUNK = 1 << 20  # bytes read at a time
_SAMPLE = 100  # records looked at to find the delimiter
_FIELD_LIMIT = 1 << 26  # characters in one field
# Encodings looked for in a file that is not UTF-8; where several fit as well, the first of them.
_ENCODINGS = (
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "shift_jis", "euc_jp", "gb18030",
    "big5", "euc_kr",
)  # fmt: skip
_CHAOS = 0.4  # most disorder that a decoded text may show, by charset-normalizer's measure
_EQUAL = 0.1  # disorder apart by less than this does not tell one encoding from another


@dataclass(frozen=True)
class Form:
    """What is said of a file and need not be found out."""

    header: bool = True
    delimiter: str = ""
    encoding: str = ""


@dataclass
class Table:
    """The records of a file by column, each with the line it begins in (the header is line 1).

    Where a folder holds several files, a line is written `train.csv:12`, and `sides` says which split each row is in.
    """

    path: Path
    columns: list[str]
    rows: Any  # Rows; a list of dictionaries is made one
    lines: list[int | str]
    delimiter: str
    encoding: str
    notes: list[str] = field(default_factory=list)  # what was found out, and not told by the file itself
    sides: list[str] | None = None  # train, validation or test, where files say so
    text: str = ""  # the column of the text, where the form of the data says so
    image: str = ""  # and so on: see ROLES
    audio: str = ""
    text_pair: str = ""
    negatives: str = ""
    boxes: str = ""
    page_size: str = ""
    label: str = ""
    nested: dict[str, str] = field(default_factory=dict)  # columns with a list or an object in them: where the first is
    running: bool = False  # one row, a text that goes on: it is divided where it stands
    prepared: dict[str, Any] | None = None  # the report of `afina prepare`, where it made the folder

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Rows):
            self.rows = Rows(self.columns, self.rows)

    def missing(self, column: str) -> str | None:
        """What to say of a column that is not there, with the nearest names (T42); None where it is."""
        if column in self.columns:
            return None
        return f"{self.path} has no column {column!r}.{did_you_mean(column, self.columns)}"


def read_csv(path: str | Path, wanted: Iterable[str] = (), *, form: Form | None = None) -> Table:
    """Read a CSV file; `wanted` columns help to tell the delimiter, and `form` says what need not be found out.

    Without a header the columns are called 1, 2, ...; a file whose header has none of the wanted columns, all of them
    numbers, is read so as well. The file is read row by row: what is held is the cells. Raises DataError with every row
    that does not fit the header.
    """
    path, wanted, form = Path(path), set(wanted), form or Form()
    header, notes = form.header, list[str]()
    encoding = checked_encoding(path, form, notes)
    csv.field_size_limit(_FIELD_LIMIT)
    named = OF_NAME.get(form.delimiter, form.delimiter)
    delimiter = named or _delimiter(path, encoding, wanted if header else set())
    records = _records(path, encoding, delimiter, notes)
    first = next(records, None)
    if first is None:
        raise DataError(f"{path} is empty; give a file with a header and a row for each text")
    columns = [name.strip() for name in first[1]]
    if header and wanted and all(re.fullmatch(r"[1-9]\d*", name) for name in wanted) and not wanted & set(columns):
        header = False
        notes.append(f"read as a file without a header, since columns are asked for by number ({shortened(sorted(wanted))})")
    if not header:
        columns = [str(i + 1) for i in range(len(columns))]
        records = itertools.chain([first], records)
    problems = Problems(str(path))
    for name in sorted({c for c in columns if columns.count(c) > 1}):
        named = f"column {name!r}" if name else "a column ''"
        problems.add(f"the header names {named} {columns.count(name)} times; rename all but one")
    rows, lines, wrong = Rows(list(dict.fromkeys(columns))), list[int | str](), list[tuple[int, int]]()
    whole = "the header" if header else f"line {first[0]}"
    for line, fields in records:
        if len(fields) != len(columns):
            wrong.append((line, len(fields)))
        elif not problems.found:
            rows.append(fields)
            lines.append(line)
    for line, found in wrong[:5]:
        problems.add(f"line {line} has {found} field{'s' * (found != 1)}, {whole} has {len(columns)} ({shortened(columns)})")
    cure = ""
    if wrong:
        rest = f"{len(wrong) - 5} more lines are like that. " if len(wrong) > 5 else ""
        cure = (
            f"{rest}The fields are separated by a {DELIMITERS.get(delimiter, repr(delimiter))}: where a text holds one "
            'itself, put the whole text in double quotes ("...").'
        )
    problems.raise_as(DataError, cure)
    if not rows:
        raise DataError(f"{path} has a header ({shortened(columns)}) and no rows; add rows, or say data.header=false")
    return Table(path, columns, rows, lines, delimiter, encoding, notes)


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where it ends in .gz; raises DataError where that cannot be had."""
    with _opened(path) as file:
        return file.read()


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file of bytes, unpacked where its name ends in .gz; raises DataError where it cannot be read."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; give a CSV file") from None
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"there is no file {path}.{near if 'Did you' in near else ''}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is no whole gzip file: {error}. Pack it again, or give it unpacked") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


@contextmanager
def open_text(path: Path, encoding: str, newline: str = "") -> Iterator[IO[str]]:
    """The text of a file, unpacked where its name ends in .gz, to be read line by line."""
    with _opened(path) as file, io.TextIOWrapper(file, encoding, newline=newline) as text:  # type: ignore[type-var]
        yield text


def decoded(path: Path, encoding: str = "") -> tuple[str, str, list[str]]:
    """The text of a file, its encoding, and what was found out about it. Raises DataError with line and byte."""
    notes: list[str] = []
    found = checked_encoding(path, Form(encoding=encoding), notes, filled=False)
    return read_bytes(path).decode(found), found, notes


def checked_encoding(path: Path, form: Form, notes: list[str], *, filled: bool = True) -> str:
    """The encoding in which a whole file can be read; it is read piece by piece.

    Raises DataError with line and byte, and for an empty file where it should be `filled`.
    """
    encoding, lines, letters = form.encoding, 0, False
    if encoding:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise DataError(f"data.encoding={encoding!r} is no encoding; expected utf-8, windows-1252 or the like") from None
    decoder = None
    for chunk in _chunks(path):
        if decoder is None:
            if chunk.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
                raise DataError(f"{path} is a spreadsheet, not a CSV file; save it as CSV (UTF-8) and give that")
            if chunk.startswith(b"\x1f\x8b"):
                raise DataError(f"{path} is packed by gzip; let its name end in .gz")
            encoding = encoding or next((name for mark, name in BYTE_ORDER_MARKS.items() if chunk.startswith(mark)), "utf-8")
            decoder = codecs.getincrementaldecoder(encoding)()
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            return _other_encoding(path, encoding, notes, asked=bool(form.encoding))
        if "\0" in text:
            line = lines + text.count("\n", 0, text.index("\0")) + 1
            raise DataError(
                f"{path}, line {line} holds a zero byte, so this is not a text file (UTF-16 without its mark? Then say "
                "data.encoding=utf-16-le)"
            )
        lines += text.count("\n")
        letters = letters or (bool(text) and not text.isspace())
    if filled and not letters:
        raise DataError(f"{path} is empty; give a file with a header and a row for each text")
    return encoding


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, some at a time, and b"" at its end."""
    with _opened(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk
    yield b""


def _other_encoding(path: Path, encoding: str, notes: list[str], *, asked: bool) -> str:
    """An older encoding of a file that cannot be read in this one. Raises DataError where none fits."""
    raw = read_bytes(path)
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        where = f"line {line}, byte {column} is 0x{raw[error.start]:02x}"
    older = _older_encoding(raw) if encoding == "utf-8" and not asked else None
    if older is None:
        cure = (
            "Leave data.encoding out, or name the one it is in"
            if asked
            else "Save the file as UTF-8, name its encoding (data.encoding=windows-1252), or convert it, for example: "
            f"iconv -f windows-1252 -t utf-8 {path.name} > utf8.csv"
        )
        raise DataError(f"{path} is not {encoding}: {where}. {cure}") from None
    notes.append(f"read as {older}, since the file is not UTF-8 ({where}); look whether its special letters are right")
    return older


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


def _delimiter(path: Path, encoding: str, wanted: set[str]) -> str:
    """The delimiter under which most wanted columns exist, most rows fit the header, and the columns are most."""

    def score(delimiter: str) -> tuple[int, float, int]:
        sample: list[list[str]] = []
        with open_text(path, encoding) as text:
            try:
                for fields in csv.reader(text, delimiter=delimiter, strict=True):
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


def _records(path: Path, encoding: str, delimiter: str, notes: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, with the lines they begin in.

    Files with tabs are often written without quoting, so that a quote is a letter like any other: where every line fits
    only when read so, it is.
    """
    if delimiter != "\t":
        return _parsed(path, encoding, delimiter, csv.QUOTE_MINIMAL)
    plain, fits = _counted(path, encoding, delimiter, csv.QUOTE_NONE)
    try:
        quoted, _ = _counted(path, encoding, delimiter, csv.QUOTE_MINIMAL)
    except DataError:
        if not fits:
            raise
        quoted = -1
    if not fits or quoted == plain:
        return _parsed(path, encoding, delimiter, csv.QUOTE_MINIMAL)
    notes.append("double quotes are read as they stand: between tabs, every line fits only so")
    return _parsed(path, encoding, delimiter, csv.QUOTE_NONE)


def _counted(path: Path, encoding: str, delimiter: str, quoting: Any) -> tuple[int, bool]:
    """How many records a file has, and whether all have as many fields."""
    widths = Counter(len(fields) for _, fields in _parsed(path, encoding, delimiter, quoting))
    return sum(widths.values()), len(widths) == 1


def _parsed(path: Path, encoding: str, delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str]]]:
    with open_text(path, encoding) as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True, quoting=quoting)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise DataError(
                        f"{path}: a quoted text that begins in line {line} is never closed; add the missing quote"
                    ) from None
                raise DataError(
                    f'{path}, line {reader.line_num}: {error}. A quote within a quoted text is written twice ("")'
                ) from None
            if any(field.strip() for field in fields):
                yield line, fields
