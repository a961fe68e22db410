"""From a table to clean examples on three sides, with no text, exact or near, on two of them (T27)."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from afina.data.clean import CleanReport, Example, clean, normalised
from afina.data.read import SPLITS
from afina.data.similar import near_duplicates
from afina.data.split import stratified
from afina.data.table import Table
from afina.errors import DataError, Problems, shortened

__all__ = ["Divided", "divided"]


@dataclass
class Divided:
    """Examples, and which of them are on which side (indices, ascending)."""

    examples: list[Example]
    sides: dict[str, list[int]]
    cleaned: CleanReport
    near: list[list[int | str]]  # lines of near-duplicate groups that were kept, each on one side
    leaks: list[int | str]  # lines dropped, since a nearly equal text is on a side that must not know it
    notes: list[str]

    def report(self) -> dict[str, Any]:
        """What a data report holds of it."""
        counts = {name: Counter(self.examples[i].label for i in rows) for name, rows in self.sides.items()}
        return {
            **asdict(self.cleaned),
            "near_duplicates": self.near,
            "leaks": self.leaks,
            "notes": self.notes,
            "splits": {
                name: {"rows": len(rows), "classes": {label: counts[name][label] for label in self.cleaned.classes}}
                for name, rows in self.sides.items()
            },
        }


def divided(table: Table, text: str, label: str, *, validation: float, test: float, seed: int) -> Divided:
    """Clean and divide. Sides that files give stay as they are: of copies on two of them, the one that is kept is in the
    test file before the validation file before the train file, so that a published test set stays whole.

    Raises DataError where there is nothing to learn from, or a side or class is lacking.
    """
    if table.sides is None:
        examples, cleaned = clean(table, text, label)
        groups = near_duplicates([normalised(e.text) for e in examples])
        rows = stratified([e.label for e in examples], validation=validation, test=test, seed=seed, groups=groups)
        near = [[examples[i].line for i in group] for group in groups]
        return Divided(examples, dict(zip(SPLITS, rows, strict=True)), cleaned, near, [], table.notes)
    lacking = [side for side in SPLITS if side not in table.sides]
    if lacking:
        raise DataError(f"{table.path} has no {' and no '.join(lacking)} file; add it, or give all rows as one file")
    order = sorted(range(len(table.rows)), key=lambda i: -SPLITS.index(table.sides[i]))  # type: ignore[index]
    first = replace(table, rows=[table.rows[i] for i in order], lines=[table.lines[i] for i in order])
    examples, cleaned = clean(first, text, label)
    side_of = dict(zip(table.lines, table.sides, strict=True))
    groups = near_duplicates([normalised(e.text) for e in examples])
    leaking: set[int] = set()
    for group in groups:
        last = max(SPLITS.index(side_of[examples[i].line]) for i in group)
        leaking |= {i for i in group if SPLITS.index(side_of[examples[i].line]) < last}
    near = [[examples[i].line for i in group if i not in leaking] for group in groups]
    place = {line: i for i, line in enumerate(table.lines)}
    kept = sorted((e for i, e in enumerate(examples) if i not in leaking), key=lambda e: place[e.line])
    sides = {side: [i for i, e in enumerate(kept) if side_of[e.line] == side] for side in SPLITS}
    problems = Problems(str(table.path))
    for side in SPLITS:
        if not sides[side]:
            problems.add(f"no usable row is left in the {side} file")
    unknown = sorted({e.label for e in kept} - {kept[i].label for i in sides["train"]})
    if unknown:
        problems.add(f"the train file has no row of the class {shortened(map(repr, unknown))}")
    problems.raise_as(DataError)
    cleaned.kept, cleaned.classes = len(kept), dict(sorted(Counter(e.label for e in kept).items()))
    leaks = sorted((examples[i].line for i in leaking), key=lambda line: place[line])
    return Divided(kept, sides, cleaned, [g for g in near if len(g) > 1], leaks, table.notes)
