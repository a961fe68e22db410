"""Makes examples of the rows of a table, by what the task says a row is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from afina.data.clean import CleanReport
from afina.data.example import Column, Example, Kind
from afina.data.options import CleanOptions
from afina.data.repair import repaired
from afina.data.table import Table
from afina.errors import DataError, Problems

__all__ = ["in_cell", "made"]

_TOLD = 5  # rows named in an error


def made(
    table: Table, kind: Kind, columns: Mapping[str, str], options: CleanOptions, report: CleanReport
) -> dict[int, Example]:
    """Examples by the number of their row; what is repaired, and rows without a text or label, are put into the report.

    `columns` says which column each role takes. Raises DataError naming rows that are not what the task expects.
    """
    examples: dict[int, Example] = {}
    wrong: list[str] = []
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
        try:
            example = kind.make(given, line)
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
            examples[i] = replace(example, row=row)
    problems = Problems(str(table.path))
    problems.found = wrong[:_TOLD]
    more = len(wrong) - _TOLD
    problems.raise_as(DataError, f"{more} more row{'s are' if more > 1 else ' is'} like that." if more > 0 else "")
    return examples


def in_cell(value: str, column: Column, steps: CleanOptions | None = None) -> str:
    """The text of a cell, repaired by the `steps` and without white space around it, where no offsets point into it."""
    if not column.repair:
        return value if value.strip() else ""
    return value.strip() if steps is None else repaired(value, steps)


def _place(line: int | str) -> str:
    return f"line {line}" if isinstance(line, int) else line
