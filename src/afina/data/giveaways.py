"""Words, and columns of the file, that alone give the label away.

A word that stands in texts of one class alone may be what the class is about, or a trace of how the rows were gathered (a
source's signature, a template): then a model learns the trace. A column that says the label, or numbers the rows, must
not be part of the input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from afina.data.example import Example
from afina.data.table import Table
from afina.data.terms import terms

__all__ = ["telling_columns", "telling_words"]

_PRECISION = 0.98
_ROWS = 10  # of a class that a word must stand in
_CHANCE = math.log(1e-6)  # a word that chance would leave in one class as often as this tells nothing
_MOST_ROWS = 50_000
_LISTED = 30


def telling_words(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Words and pairs of words of which at least 98 % of the texts have one label; the least likely by chance first."""
    examples = examples[:_MOST_ROWS]
    sizes = Counter(e.label for e in examples)
    if len(sizes) < 2:
        return []
    total: Counter[str] = Counter()
    each: dict[str, Counter[str]] = {label: Counter() for label in sizes}
    for example in examples:
        found = terms(example.text)
        total.update(found)
        each[example.label].update(found)
    telling: list[tuple[float, dict[str, Any]]] = []
    for label, counts in each.items():
        share = sizes[label] / len(examples)
        for term, own in counts.items():
            chance = own * math.log(share)  # of all these rows being of the class, did the word tell nothing
            if own >= _ROWS and chance < _CHANCE and own >= _PRECISION * total[term]:
                part = round(own / sizes[label], 3)
                telling.append((chance, {"words": term, "label": label, "rows": own, "of": total[term], "of_class": part}))
    telling.sort(key=lambda found: (found[0], found[1]["words"]))
    return _without_parts([found for _, found in telling])[:_LISTED]


def _without_parts(telling: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a word and a pair that holds it, in the same rows, the pair alone."""
    pairs = {(word, f["label"], f["rows"]) for f in telling if " " in f["words"] for word in f["words"].split()}
    return [f for f in telling if (f["words"], f["label"], f["rows"]) not in pairs]


def telling_columns(
    table: Table, columns: Mapping[str, str], rows: Sequence[int], labels: Sequence[str] | None
) -> list[dict[str, str]]:
    """What is to be known of each column: `rows` are numbers of rows that are used, `labels` their classes, if any."""
    found = []
    rows = rows[:_MOST_ROWS]
    labels = labels[: len(rows)] if labels is not None else None
    roles = {column: role for role, column in columns.items()}
    for name in table.columns:
        cells = table.rows.column(name)
        values = [cells[i].strip() for i in rows]
        distinct = set(values)
        what = ""
        if len(distinct) == 1 and len(rows) > 1:
            what = f"is {_cut(values[0])!r} in every row"
        elif len(distinct) == len(rows) and all(value.isdigit() for value in values):
            what = "numbers the rows: no two have the same"
        elif labels is not None and roles.get(name) != "label" and (share := _said(values, labels)):
            what = f"says the label: its {len(distinct)} values give it in {share:.1%} of the rows"
        if what and (name not in roles or not what.startswith("numbers") or roles[name] != "label"):
            found.append({"column": name, "role": roles.get(name, ""), "what": what})
    return found


def _said(values: Sequence[str], labels: Sequence[str]) -> float:
    """The share of rows whose label a column's value tells, where its values repeat and do so nearly always; else 0."""
    of_value: dict[str, Counter[str]] = {}
    for value, label in zip(values, labels, strict=True):
        of_value.setdefault(value, Counter())[label] += 1
    repeated = {value: counts for value, counts in of_value.items() if counts.total() > 1}
    rows = sum(counts.total() for counts in repeated.values())
    if len(repeated) < 2 or 2 * rows < len(values):
        return 0.0
    share = sum(max(counts.values()) for counts in repeated.values()) / rows
    commonest = Counter(labels).most_common(1)[0][1] / len(labels)
    return share if share >= _PRECISION and share > (1 + commonest) / 2 else 0.0


def _cut(value: str) -> str:
    return value if len(value) <= 40 else value[:39] + "…"
