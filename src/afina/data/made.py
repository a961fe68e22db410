"""Makes examples of the rows of a table, by what the task says a row is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from afina.data.example import Column, Example, Kind
from afina.data.table import Table
from afina.errors import DataError, Problems

__all__ = ["in_cell", "made"]

_TOLD = 5  # rows named in an error


def made(table: Table, kind: Kind, columns: Mapping[str, str]) -> tuple[dict[int, Example], list[int], list[int]]:
    """Examples by the number of their row, then the rows without a text, and those without a label.

    `columns` says which column each role takes. Raises DataError naming rows that are not what the task expects.
    """
    examples: dict[int, Example] = {}
    without_text: list[int] = []
    without_label: list[int] = []
    wrong: list[str] = []
    labelled = kind.labels != "none"
    for i, (line, cells) in enumerate(zip(table.lines, table.rows, strict=True)):
        row = {role: in_cell(cells[column], kind.columns[role]) for role, column in columns.items()}
        given = {role: value for role, value in row.items() if value or role != "label"}
        lacks_text = not any(value for role, value in given.items() if role != "label")
        lacks_label = labelled and "label" in columns and "label" not in given
        try:
            example = kind.make(given, line)
        except ValueError as error:
            if lacks_text:
                without_text.append(i)
            elif lacks_label:
                without_label.append(i)
            else:
                wrong.append(f"{_place(line)}: {error}")
            continue
        if not example.text.strip():
            without_text.append(i)
        elif lacks_label or (labelled and not example.label.strip()):
            without_label.append(i)
        else:
            examples[i] = replace(example, row=row)
    problems = Problems(str(table.path))
    problems.found = wrong[:_TOLD]
    more = len(wrong) - _TOLD
    problems.raise_as(DataError, f"{more} more row{'s are' if more > 1 else ' is'} like that." if more > 0 else "")
    return examples, without_text, without_label


def in_cell(value: str, column: Column) -> str:
    """The text of a cell without white space around it, which stays where offsets may point into the text."""
    return value.strip() if column.repair or not value.strip() else value


def _place(line: int | str) -> str:
    return f"line {line}" if isinstance(line, int) else line
