"""Makes examples of the rows of a table, by what the task says a row is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from afina.data.clean import CleanReport
from afina.data.example import Column, Example, Kind, UnusableError
from afina.data.media import Look, looks_at
from afina.data.options import CleanOptions
from afina.data.repair import repaired
from afina.data.table import Table
from afina.errors import DataError, Problems

__all__ = ["held", "in_cell", "made"]

_TOLD = 5  # rows named in an error
_FILES = 20  # and files
Looks = Mapping[str, Look | str]  # by the path: what was seen, or what is wrong


def made(
    table: Table, kind: Kind, columns: Mapping[str, str], options: CleanOptions, report: CleanReport
) -> dict[int, Example]:
    """Examples by the number of their row; what is repaired, and rows without a text or label, are put into the report.

    `columns` says which column each role takes. Raises DataError naming rows that are not what the task expects.
    """
    examples: dict[int, Example] = {}
    wrong: list[str] = []
    looks = _looks(table, kind, columns, options, report)
    labelled = kind.labels != "none"
    for i, (line, cells) in enumerate(zip(table.lines, table.rows, strict=True)):
        row = {role: in_cell(cells[column], kind.columns[role]) for role, column in columns.items()}
        for role, value in row.items():
            row[role] = better = in_cell(value, kind.columns[role], options)
            if better != value:
                report.note_repair(line, only_space="".join(value.split()) == "".join(better.split()))
        given = {role: value for role, value in row.items() if value or role != "label"}
        lacks_text = not any(value for role, value in given.items() if role != "label")
        lacks_label = labelled and "label" in columns and "label" not in given
        if any(isinstance(looks[row[role]], str) for role in kind.media if row.get(role)):
            report.broken_files.append(line)
            continue
        try:
            example = kind.make(given, line)
        except UnusableError as error:
            report.unusable.setdefault(str(error), []).append(line)
            continue
        except ValueError as error:
            if lacks_text:
                report.empty_texts.append(line)
            elif lacks_label:
                report.missing_labels.append(line)
            else:
                wrong.append(f"{_place(line)}: {error}")
            continue
        if not example.text.strip():
            report.empty_texts.append(line)
        elif lacks_label or (labelled and not example.label.strip()):
            report.missing_labels.append(line)
        else:
            examples[i] = replace(example, row=row, text=held(example.text, row, kind, looks))
    problems = Problems(str(table.path))
    problems.found = wrong[:_TOLD]
    more = len(wrong) - _TOLD
    problems.raise_as(DataError, f"{more} more row{'s are' if more > 1 else ' is'} like that." if more > 0 else "")
    return examples


def held(text: str, row: Mapping[str, str], kind: Kind, looks: Looks) -> str:
    """The text of an example with a digest of what each file holds in the place of its path."""
    for role in kind.media:
        if role != "label" and isinstance(seen := looks.get(row.get(role, "")), Look):
            text = text.replace(row[role], seen.digest)
    return text


def _looks(
    table: Table, kind: Kind, columns: Mapping[str, str], options: CleanOptions, report: CleanReport
) -> dict[str, Look | str]:
    """Look at every file that a row names. Raises DataError with those that are broken, unless they are to be left out."""
    found: dict[str, Look | str] = {}
    wrong: list[str] = []
    for role, medium in kind.media.items():
        if role not in columns:
            continue
        cells = [cell.strip() for cell in table.rows.column(columns[role])]
        seen = looks_at([cell for cell in cells if cell], medium)
        found |= seen
        told: dict[str, list[int | str]] = {}
        for line, cell in zip(table.lines, cells, strict=True):
            if isinstance(look := seen.get(cell), str):
                named = cell if isinstance(line, int) else ""  # a line of a folder is the file's name
                wrong.append(f"{_place(line)}{f', {named}' if named else ''}: {look}")
            elif look is not None:
                for note in look.notes:
                    told.setdefault(note, []).append(line)
        for note, lines in told.items():
            many = f"{len(lines)} {medium.name}s are" if len(lines) > 1 else f"1 {medium.name} is"
            report.files.append(f"{many} {note} (for example {_place(lines[0])})")
    if wrong and not options.broken_files:
        problems = Problems(str(table.path))
        problems.found = wrong[:_FILES]
        more = f"{len(wrong) - _FILES} more files are like that. " if len(wrong) > _FILES else ""
        problems.raise_as(DataError, f"{more}Mend or remove them, or leave them out with data.clean.broken_files=true.")
    report.broken = wrong
    return found


def in_cell(value: str, column: Column, steps: CleanOptions | None = None) -> str:
    """The text of a cell, repaired by the `steps` and without white space around it, where no offsets point into it."""
    if not column.repair:
        return value if value.strip() else ""
    return value.strip() if steps is None else repaired(value, steps)


def _place(line: int | str) -> str:
    return f"line {line}" if isinstance(line, int) else line
