"""Messages of two or three classes that are made, no two of them alike unless that is asked for."""

from __future__ import annotations

import random
from pathlib import Path

from afina.data.divide import divided
from afina.data.example import Column, Example, Kind
from afina.data.options import CleanOptions, DataOptions
from afina.data.table import Table

SYLLABLES = ["ka", "lo", "mi", "ru", "se", "ti", "vo", "ba", "de", "gu", "ha", "ni", "po", "xa", "zu"]
KIND = Kind(
    {"text": Column("the text", ("text",)), "label": Column("the class", ("label",))},
    "class",
    lambda row, line: Example(row["text"], row.get("label", ""), line),
)


def texts(number, seed=0):
    chance = random.Random(seed)
    return [" ".join("".join(chance.choices(SYLLABLES, k=3)) for _ in range(7)) for _ in range(number)]


def table(rows, *, sides=None, more=None):
    """Rows `(text, label)`, and further columns by name."""
    more = more or {}
    cells = [
        {"text": text, "label": label, **{name: values[i] for name, values in more.items()}}
        for i, (text, label) in enumerate(rows)
    ]
    lines = list(range(2, 2 + len(cells)))
    return Table(Path("rows.csv"), ["text", "label", *more], cells, lines, ",", "utf-8", sides=sides)


def cut(made, seed=0, clean=None, **options):
    options = DataOptions(clean=CleanOptions(**(clean or {})), **options)
    return divided(made, KIND, options, columns={"text": "text", "label": "label"}, seed=seed)
