"""What a file must have to be learned from; everything that is lacking is told together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from afina.data.clean import CleanReport
from afina.data.example import Example, Kind
from afina.data.read import SPLITS
from afina.data.table import Table
from afina.errors import DataError, Problems, shortened

__all__ = ["check_classes", "check_empty", "check_sides"]

_MANY = 8  # rare classes from which on the column is rather no label


def check_empty(table: Table, report: CleanReport) -> None:
    """Raise DataError where a row has no text or label."""
    problems = Problems(str(table.path))
    for lines, what in ((report.empty_texts, report.what), (report.missing_labels, "label")):
        if lines:
            rows = f"{len(lines)} row{'s have' if len(lines) > 1 else ' has'}"
            problems.add(f"{rows} no {what} (line {shortened(lines)})")
    for why, lines in report.unusable.items():
        problems.add(f"{why} (line {shortened(lines)})")
    problems.raise_as(DataError, "Fill them in, or let data.clean.empty=true drop them.")


def check_classes(
    table: Table, kind: Kind, columns: Mapping[str, str], examples: Mapping[int, Example], report: CleanReport, *,
    three: bool,
) -> None:  # fmt: skip
    """Raise DataError where nothing is left, there is one class alone or, if `three` of each are needed, one has fewer."""
    if not examples:
        what = f"a {kind.what}" if kind.labels == "none" else f"both a {kind.what} and a label"
        dropped = "".join(f"\n  {line}" for line in report.lines())
        used = ", ".join(f"{role} is column {column!r}" for role, column in columns.items())
        raise DataError(f"{table.path} has no row with {what} that can be used ({used}){dropped}")
    if kind.labels != "class":
        return
    counts = Counter(e.label for e in examples.values())
    column = columns.get("label", "label")
    if len(counts) == 1:
        only = next(iter(counts))
        raise DataError(f"{table.path}: column {column!r} is {only!r} in every row; there is nothing to tell apart")
    if not three:
        return
    problems = Problems(f"{table.path}, column {column!r}")
    small = {name: number for name, number in sorted(counts.items()) if number < 3}
    if len(small) > _MANY and len(small) > len(counts) / 2:
        problems.add(f"{len(counts)} different values in {len(examples)} rows, most of them rare: is this the label?")
    else:
        for name, number in small.items():
            lines = shortened(e.line for e in examples.values() if e.label == name)
            problems.add(
                f"class {name!r} has {number} row{'s' if number > 1 else ''} (line {lines}); at least 3 are needed, one "
                "each to train, validate and test. Add rows, or rename or remove the class"
            )
    problems.raise_as(DataError)


def check_sides(
    table: Table, kind: Kind, examples: Sequence[Example], sides: Mapping[str, Sequence[int]], *, whole: bool
) -> None:
    """Raise DataError where a side is empty, train lacks a class or, if every side must be `whole`, another lacks one."""
    problems = Problems(str(table.path))
    for side, rows in sides.items():
        if not rows:
            problems.add(f"no usable row is left for {side}; add rows")
    if kind.labels == "class":
        there = {side: {examples[i].label for i in rows} for side, rows in sides.items()}
        unknown = sorted((there["validation"] | there["test"]) - there["train"])
        if unknown:
            problems.add(f"train has no row of the class {shortened(map(repr, unknown))}")
        for side in SPLITS if whole else ():
            for name in sorted({e.label for e in examples} - there[side]):
                problems.add(f"class {name!r} has too few different texts for a row of it in {side}; add some")
    problems.raise_as(DataError)
