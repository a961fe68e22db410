"""Tables and kinds of rows for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

from afina.data.divide import divided
from afina.data.example import Column, Example, Kind
from afina.data.options import CleanOptions, DataOptions
from afina.data.table import Table

COLUMNS = {"text": "t", "label": "l"}


def kind(labels="class", make=None):
    """A text and a label; numbers are checked."""

    def plain(row, line):
        if labels == "number" and row.get("label"):
            float(row["label"])
        return Example(row["text"], row.get("label", ""), line)

    columns = {"text": Column("the text", ("text", "message")), "label": Column("the label", ("label",))}
    return Kind({k: v for k, v in columns.items() if k == "text" or labels != "none"}, labels, make or plain)


def table(*rows, columns="tl", sides=None):
    """Rows of a file `rows.csv` that begin in line 2."""
    cells = [dict(zip(columns, row, strict=True)) for row in rows]
    return Table(Path("rows.csv"), list(columns), cells, list(range(2, 2 + len(rows))), ",", "utf-8", sides=sides)


def cut(rows, labels="class", *, seed=0, of=None, columns=None, clean=None, **options):
    """Cleaned and divided."""
    made = of or kind(labels)
    columns = columns or {role: COLUMNS[role] for role in made.columns}
    return divided(rows, made, DataOptions(clean=CleanOptions(**(clean or {})), **options), columns=columns, seed=seed)
