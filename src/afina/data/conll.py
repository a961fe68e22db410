"""Reads columns: one word a line, its tag in the last column, a blank line after each sentence (CoNLL).

A line of white space alone is blank too, and lines that begin a document (`-DOCSTART-`) are skipped. Columns are separated
by tabs where every line has one, else by white space. Whatever else does not fit is an error that names the line: a word
that lost its tag would shift the tags of all that follow it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from afina.data.table import Table, decoded
from afina.errors import DataError, Problems

__all__ = ["read_conll"]

OTHERS = (".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".gz", ".arrow")  # forms that are read elsewhere
SURE = (".conll", ".conll2003", ".bio", ".iob", ".iob2", ".bioes", ".iobes")
DOCUMENT = "-DOCSTART-"
_WRONG = 5  # lines named in an error


def read_conll(path: Path) -> Table | None:
    """Sentences, each a row with the JSON lists `tokens` and `tags`; columns between these two are called 2, 3, ...

    None where the file is of another form. Raises DataError with every line that does not fit.
    """
    ending = path.suffix.lower()
    if ending in OTHERS or not path.is_file():
        return None
    text, encoding, notes = decoded(path)
    lines = [line.rstrip("\r") for line in text.split("\n")]
    tabs = all("\t" in line for line in lines if line.strip() and not line.startswith(DOCUMENT))
    if ending not in SURE and not _looks_like_columns(lines, tabs):
        return None
    return _table(path, lines, tabs, encoding, notes)


def _looks_like_columns(lines: list[str], tabs: bool) -> bool:
    """Two columns or more, the same number in every line but for the blank ones, of which there are some."""
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    counts = {len(_fields(line, tabs)) for line in lines if line.strip() and not line.startswith(DOCUMENT)}
    return len(counts) == 1 and min(counts) > 1 and not all(line.strip() for line in lines)


def _fields(line: str, tabs: bool) -> list[str]:
    return [field.strip() for field in line.split("\t")] if tabs else re.split(r"[ \t]+", line.strip(" \t"))


def _table(path: Path, lines: list[str], tabs: bool, encoding: str, notes: list[str]) -> Table:
    found = [(n, _fields(line, tabs)) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith(DOCUMENT)]
    if not found:
        raise DataError(f"{path} holds no words; expected one a line, and a blank line after each sentence")
    width = Counter(len(fields) for _, fields in found).most_common(1)[0][0]
    problems = Problems(str(path))
    between = "tabs" if tabs else "white space"
    for n, fields in found:
        if len(fields) != width:
            problems.add(f"line {n} has {_columns(len(fields))} ({lines[n - 1].strip()[:40]!r}), most lines have {width}")
        elif not all(fields):
            problems.add(f"line {n} has nothing in column {fields.index('') + 1} ({lines[n - 1].strip()[:40]!r})")
    more = len(problems.found) - _WRONG
    del problems.found[_WRONG:]
    rest = f"{more} more lines are like that. " if more > 0 else ""
    problems.raise_as(DataError, f"{rest}Columns are separated by {between}; write a word and its tag in every line")
    names = ["tokens", *(str(i) for i in range(2, width)), "tags"] if width > 1 else ["tokens"]
    sentences = _sentences(lines)
    of_line = dict(found)
    rows = []
    for sentence in sentences:
        columns = zip(*(of_line[n] for n in sentence), strict=True)
        rows.append({name: json.dumps(list(c), ensure_ascii=False) for name, c in zip(names, columns, strict=True)})
    if len(sentences) == 1 and len(found) > 1000:
        notes.append(f"one sentence of {len(found)} words, since no line is blank; put one after each sentence")
    return Table(
        path, names, rows, [sentence[0] for sentence in sentences], "\t" if tabs else " ", encoding, notes,
        text="tokens", label="tags" if width > 1 else "", nested=dict.fromkeys(names, "each row is a list"),
    )  # fmt: skip


def _columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"


def _sentences(lines: list[str]) -> list[list[int]]:
    """Numbers of the lines of each sentence."""
    made: list[list[int]] = [[]]
    for n, line in enumerate(lines, 1):
        if line.strip() and not line.startswith(DOCUMENT):
            made[-1].append(n)
        elif made[-1]:
            made.append([])
    return made if made[-1] else made[:-1]
