"""From a table to clean examples on three sides, with no text, exact or near, on two of them (T27)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from afina.data.clean import CleanReport, clean, count, names_in, normalised
from afina.data.example import Example, Kind
from afina.data.groups import joined
from afina.data.made import made
from afina.data.options import DataOptions
from afina.data.read import SPLITS
from afina.data.similar import near_duplicates
from afina.data.split import stratified
from afina.data.stretches import stretched
from afina.data.table import Table
from afina.errors import DataError, Problems, shortened

__all__ = ["Divided", "divided"]

Examples = dict[int, Example]  # by the number of their row
Groups = list[list[int]]  # numbers of rows
_BINS = 10  # strata of numbers


@dataclass
class Divided:
    """Examples, and which of them are on which side (indices, ascending)."""

    examples: list[Example]
    rows: list[int]  # number of the row of the table that each example was made of
    sides: dict[str, list[int]]
    cleaned: CleanReport
    near: list[list[int | str]]  # lines of groups of nearly equal texts that were kept, each on one side
    leaks: list[int | str]  # lines dropped, since a nearly equal text is on a side that must not know it
    labels: str  # what the labels are: see `Kind`
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One sentence for each thing that was found out, repaired or dropped."""
        found = [*self.notes, *self.cleaned.lines()]
        if self.near:
            found.append(f"{_groups(len(self.near))} of nearly equal texts, each kept on one side of the split")
        if self.leaks:
            what = "nearly the same text is on the test or validation side"
            found.append(f"{len(self.leaks)} row{'s' if len(self.leaks) > 1 else ''} dropped: {what}")
        return found

    def report(self) -> dict[str, Any]:
        """What a data report holds of it."""
        splits = {}
        for name, rows in self.sides.items():
            counts = Counter(c for i in rows for c in names_in(self.examples[i].label, self.labels))
            splits[name] = {"rows": len(rows), "classes": {label: counts[label] for label in self.cleaned.classes}}
        return {
            **asdict(self.cleaned),
            "near_duplicates": self.near,
            "leaks": self.leaks,
            "notes": self.notes,
            "splits": splits,
        }


def divided(table: Table, kind: Kind, options: DataOptions, *, columns: Mapping[str, str], seed: int) -> Divided:
    """Make examples of the rows of a table, clean and divide them. `columns` says which column each role takes.

    Sides that files give stay as they are: of copies on two of them, the one that is kept is in the test file before the
    validation file before the train file, so that a published test set stays whole. A side without a file is taken from
    train. Raises DataError where there is nothing to learn from, or a side or class is lacking.
    """
    if table.running:
        table = stretched(table, validation=options.validation, test=options.test)
    report = CleanReport(rows=len(table.rows))
    notes = list(table.notes)
    found, without_text, without_label = made(table, kind, columns)
    report.empty_texts = [table.lines[i] for i in without_text]
    report.missing_labels = [table.lines[i] for i in without_label]
    if not options.clean.empty:
        _refuse_empty(table, report)
    if table.sides is not None:
        found = _last_side_first(found, table.sides)
    kept = clean(found, kind.labels, options.clean, report)
    if not kept:
        _nothing_left(table, kind, report)
    near: Groups = []
    if options.clean.near_duplicates != "ignore":
        near = _near(kept)
    if options.clean.near_duplicates == "drop":
        report.near_dropped = [kept.pop(i).line for group in near for i in group[1:]]
        near = []
    together = joined([*near, *_same(kept, options)])
    kept = dict(sorted(kept.items()))
    if kind.labels == "class":
        _check_classes(table, columns, kept)
    if table.sides is None:
        side_of, leaking = _split(kept, together, kind, options, seed), set[int]()
    else:
        side_of, leaking = _given(table, kept, together, kind, options, seed, notes)
    leaks = [kept.pop(i).line for i in sorted(leaking)]
    numbers = list(kept)
    sides = {side: [k for k, i in enumerate(numbers) if side_of[i] == side] for side in SPLITS}
    examples = list(kept.values())
    _check_sides(table, kind, examples, sides)
    count(examples, kind.labels, report)
    lines = [[kept[i].line for i in group if i in kept] for group in near]
    return Divided(examples, numbers, sides, report, [g for g in lines if len(g) > 1], leaks, kind.labels, notes)


def _groups(number: int) -> str:
    return f"{number} group{'s' if number > 1 else ''}"


# --- what stays together


def _near(examples: Examples) -> Groups:
    """Rows whose texts are nearly the same, in the order of the examples."""
    numbers = list(examples)
    return [[numbers[k] for k in group] for group in near_duplicates([normalised(e.text) for e in examples.values()])]


def _same(examples: Examples, options: DataOptions) -> Groups:
    """Rows that one side must have whole: of the same text, or of the same group."""
    texts: dict[str, list[int]] = {}
    groups: dict[str, list[int]] = {}
    for i, example in examples.items():
        if options.clean.near_duplicates != "ignore":
            texts.setdefault(normalised(example.text), []).append(i)
        if example.group:
            groups.setdefault(example.group, []).append(i)
    return [group for group in (*texts.values(), *groups.values()) if len(group) > 1]


# --- sides


def _split(examples: Examples, together: Groups, kind: Kind, options: DataOptions, seed: int) -> dict[int, str]:
    """The side of each row: by chance, with the shares of classes on every side."""
    numbers = list(examples)
    place = {i: k for k, i in enumerate(numbers)}
    groups = [[place[i] for i in group] for group in together]
    strata = _strata(list(examples.values()), kind.labels)
    parts = stratified(strata, validation=options.validation, test=options.test, seed=seed, groups=groups)
    return {numbers[k]: side for side, rows in zip(SPLITS, parts, strict=True) for k in rows}


def _strata(examples: Sequence[Example], labels: str) -> list[str]:
    """What is to have the same share on every side: the class, the rarest of several classes, the size of a number."""
    if labels == "class":
        return [e.label for e in examples]
    if labels == "classes":
        counts = Counter(name for e in examples for name in names_in(e.label, labels))
        return [min(names_in(e.label, labels), key=lambda name: (counts[name], name), default="") for e in examples]
    if labels == "number" and len(examples) >= 3 * _BINS:
        order = sorted(range(len(examples)), key=lambda i: float(examples[i].label))
        strata = [""] * len(examples)
        for position, i in enumerate(order):
            strata[i] = str(position * _BINS // len(order))
        return strata
    return [""] * len(examples)


def _last_side_first(found: Examples, sides: Sequence[str]) -> Examples:
    return dict(sorted(found.items(), key=lambda item: (-SPLITS.index(sides[item[0]]), item[0])))


def _given(
    table: Table, examples: Examples, together: Groups, kind: Kind, options: DataOptions, seed: int, notes: list[str]
) -> tuple[dict[int, str], set[int]]:
    """The side of each row as files give it, and the rows that tell a later side's texts."""
    assert table.sides is not None
    side_of = {i: table.sides[i] for i in examples}
    leaking: set[int] = set()
    for group in together:
        last = max(SPLITS.index(side_of[i]) for i in group)
        leaking |= {i for i in group if SPLITS.index(side_of[i]) < last}
    lacking = [side for side in SPLITS if side not in table.sides]
    if lacking:
        train = {i: e for i, e in examples.items() if side_of[i] == "train" and i not in leaking}
        shares = {side: getattr(options, side) if side in lacking else 0.0 for side in SPLITS[1:]}
        groups = [group for group in together if not leaking & set(group) and set(group) <= set(train)]
        side_of |= _split(train, groups, kind, _with_shares(options, shares), seed)
        notes.append(f"no {' and no '.join(lacking)} file, so rows for it are taken from train")
    return side_of, leaking


def _with_shares(options: DataOptions, shares: Mapping[str, float]) -> DataOptions:
    from afina.core.config import changed

    return changed(options, **shares)  # type: ignore[no-any-return]


# --- what cannot be


def _nothing_left(table: Table, kind: Kind, report: CleanReport) -> None:
    what = "a text" if kind.labels == "none" else "both a text and a label"
    dropped = "".join(f"\n  {line}" for line in report.lines())
    raise DataError(f"{table.path} has no row with {what}{dropped}")


def _refuse_empty(table: Table, report: CleanReport) -> None:
    problems = Problems(str(table.path))
    for lines, what in ((report.empty_texts, "text"), (report.missing_labels, "label")):
        if lines:
            rows = f"{len(lines)} row{'s have' if len(lines) > 1 else ' has'}"
            problems.add(f"{rows} no {what} (line {shortened(lines)})")
    problems.raise_as(DataError, "Fill them in, or let data.clean.empty=true drop them.")


def _check_classes(table: Table, columns: Mapping[str, str], examples: Examples) -> None:
    counts = Counter(e.label for e in examples.values())
    column = columns.get("label", "label")
    if len(counts) == 1:
        only = next(iter(counts))
        raise DataError(f"{table.path}: column {column!r} is {only!r} in every row; there is nothing to tell apart")
    if table.sides is not None:
        return
    problems = Problems(f"{table.path}, column {column!r}")
    small = {name: number for name, number in sorted(counts.items()) if number < 3}
    if len(small) > 8 and len(small) > len(counts) / 2:
        problems.add(f"{len(counts)} different values in {len(examples)} rows, most of them rare: is this the label?")
    else:
        for name, number in small.items():
            lines = shortened(e.line for e in examples.values() if e.label == name)
            problems.add(
                f"class {name!r} has {number} row{'s' if number > 1 else ''} (line {lines}); at least 3 are needed, one "
                "each to train, validate and test. Add rows, or rename or remove the class"
            )
    problems.raise_as(DataError)


def _check_sides(table: Table, kind: Kind, examples: Sequence[Example], sides: Mapping[str, Sequence[int]]) -> None:
    problems = Problems(str(table.path))
    for side, rows in sides.items():
        if not rows:
            where = f" in the {side} file" if table.sides and side in table.sides else f" for {side}"
            problems.add(f"no usable row is left{where}; add rows")
    if kind.labels == "class":
        there = {side: {examples[i].label for i in rows} for side, rows in sides.items()}
        unknown = sorted((there["validation"] | there["test"]) - there["train"])
        if unknown:
            problems.add(f"train has no row of the class {shortened(map(repr, unknown))}")
        for side in SPLITS if table.sides is None else ():
            for name in _lacking(examples, there[side]):
                problems.add(f"class {name!r} has too few different texts for a row of it in {side}; add some")
    problems.raise_as(DataError)


def _lacking(examples: Iterable[Example], there: set[str]) -> list[str]:
    return sorted({e.label for e in examples} - there)
