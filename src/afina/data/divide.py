"""From a table to clean examples on three sides, with no text, exact or near, on two of them (T27)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from afina.data.assign import by_chance, by_time, last_first, leaking, said_sides
from afina.data.balance import class_weights, oversampled, undersampled
from afina.data.checks import check_classes, check_empty, check_sides
from afina.data.clean import CleanReport, clean, count, names_in, normalised
from afina.data.example import Example, Kind
from afina.data.groups import joined
from afina.data.inspect import inspected, said
from afina.data.made import made
from afina.data.options import CleanOptions, DataOptions
from afina.data.read import SPLITS
from afina.data.similar import near_duplicates
from afina.data.stretches import stretched
from afina.data.table import Table
from afina.data.times import read_times

__all__ = ["Divided", "divided"]

Examples = dict[int, Example]  # by the number of their row
Groups = list[list[int]]  # numbers of rows
AS_IT_IS = CleanOptions(
    unicode=False, duplicates=False, near_duplicates="ignore", conflicts=False, label_spelling=False, suspects=False
)


@dataclass
class Divided:
    """Examples, and which of them are on which side (indices, ascending; repeated where train is oversampled)."""

    examples: list[Example]
    rows: list[int]  # number of the row of the table that each example was made of
    sides: dict[str, list[int]]
    cleaned: CleanReport
    labels: str  # what the labels are: see `Kind`
    split: str  # how rows were divided
    near: list[list[int | str]] = field(default_factory=list)  # lines of nearly equal texts, each group on one side
    leaks: list[int | str] = field(default_factory=list)  # dropped, since a later side has nearly the same text
    left_out: list[int | str] = field(default_factory=list)  # dropped, so that classes are of one size
    repeated: int = 0  # rows that train has more than once, counted each time but the first
    weights: dict[str, float] | None = None  # of classes, in the loss
    notes: list[str] = field(default_factory=list)
    inspected: dict[str, Any] = field(default_factory=dict)  # what is to be known of the rows

    def lines(self) -> list[str]:
        """One sentence for each thing that was found out, repaired or dropped."""
        found = [*self.notes, *self.cleaned.lines()]
        if self.near:
            found.append(f"{_counted(len(self.near), 'group')} of nearly equal texts, each kept on one side of the split")
        if self.leaks:
            same = f"{'nearly ' if self.cleaned.what == 'text' else ''}the same {self.cleaned.what}"
            what = f"{same}, or one of the same group, is on the test or validation side"
            found.append(f"{_counted(len(self.leaks), 'row')} dropped: {what}")
        if self.left_out:
            found.append(f"{_counted(len(self.left_out), 'row')} left out, so that classes are of one size")
        if self.repeated:
            found.append(f"{_counted(self.repeated, 'training row')} repeated, so that classes are of one size")
        if self.weights:
            found.append("classes weigh " + ", ".join(f"{k} {v:.3g}" for k, v in list(self.weights.items())[:8]))
        return [*found, *said(self.inspected)]

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
            "left_out": self.left_out,
            "repeated": self.repeated,
            "class_weights": self.weights,
            "notes": self.notes,
            "split": self.split,
            "splits": splits,
            **self.inspected,
        }


def divided(table: Table, kind: Kind, options: DataOptions, *, columns: Mapping[str, str], seed: int) -> Divided:
    """Make examples of the rows of a table, clean and divide them. `columns` says which column each role takes.

    Sides that files or a column give stay as they are: of copies on two of them, the one that is kept is on the test side
    before validation before train, so that a published test set stays whole. A side that is not given is taken from train.
    The same seed gives the same rows. Raises DataError where there is nothing to learn from, or a side or class is lacking.
    """
    if table.running:
        table = stretched(table, validation=options.validation, test=options.test)
    mode, notes = options.mode(table.sides is not None), list(table.notes)
    report = CleanReport(rows=len(table.rows), what=kind.what)
    steps = options.clean
    if table.prepared is not None and steps == CleanOptions():
        steps = AS_IT_IS
        notes.append("rows are taken as `afina prepare` left them")
    found = made(table, kind, columns, steps, report)
    if not steps.empty:
        check_empty(table, report)
    given = _given(table, options, found) if mode == "given" else None
    kept = clean(found if given is None else last_first(found, given), kind.labels, steps, report)
    check_classes(table, kind, columns, kept, report, three=mode in ("stratified", "grouped"))
    if not kind.held_out:
        return _all_learned(kept, kind, notes, report)
    near = [] if steps.near_duplicates == "ignore" or not kind.of_text else _near(kept, steps.near_share)
    if steps.near_duplicates == "drop":
        report.near_dropped = [kept.pop(i).line for group in near for i in group[1:]]
        near = []
    together = joined([*near, *_same(kept, steps), *_of_column(table, options, kept)])
    kept = dict(sorted(kept.items()))
    done = Divided([], [], {}, report, kind.labels, mode, notes=notes)
    if options.balance == "undersample_before_split":
        kept, together = _balanced_first(kept, together, done, seed)
    side_of = _sides(table, kind, options, mode, given, kept, together, done, seed)
    leaks = leaking(together, side_of)
    done.leaks = [kept.pop(i).line for i in sorted(leaks)]
    done.rows, done.examples = list(kept), list(kept.values())
    done.sides = {side: [k for k, i in enumerate(done.rows) if side_of[i] == side] for side in SPLITS}
    check_sides(table, kind, done.examples, done.sides, whole=mode == "stratified")
    lines = [[kept[i].line for i in group if i in kept] for group in near]
    done.near = [group for group in lines if len(group) > 1]
    if steps.near_duplicates == "ignore":
        _count_known(done, steps.near_share)
    _balance(done, options, table, seed)
    count(done.examples, kind.labels, report)
    done.inspected = inspected(
        done.examples, done.rows, table, columns, kind, seed, suspects=steps.suspects
    )  # fmt: skip
    return done


def _all_learned(kept: Examples, kind: Kind, notes: list[str], report: CleanReport) -> Divided:
    """Every row trains; one of each group validates and tests, by figures that say how well it was learned."""
    examples, first = list(kept.values()), dict[str, int]()
    for k, example in enumerate(examples):
        first.setdefault(example.group, k)
    own = list(first.values())
    said = f"every {kind.what} is learned from, so figures say how well they were learned, not what new ones would give"
    count(examples, kind.labels, report)
    sides = {"train": list(range(len(examples))), "validation": own, "test": own}
    return Divided(examples, list(kept), sides, report, kind.labels, "none held out", notes=[*notes, said])


# --- what stays together


def _near(examples: Examples, share: float) -> Groups:
    """Rows whose texts are nearly the same, in the order of the examples."""
    numbers = list(examples)
    return [[numbers[k] for k in group] for group in near_duplicates([normalised(e.text) for e in examples.values()], share)]


def _same(examples: Examples, steps: CleanOptions) -> Groups:
    """Rows that one side must have whole: of the same text, or of the same group."""
    texts: dict[str, list[int]] = {}
    groups: dict[str, list[int]] = {}
    for i, example in examples.items():
        if steps.near_duplicates != "ignore":
            texts.setdefault(normalised(example.text), []).append(i)
        if example.group:
            groups.setdefault(example.group, []).append(i)
    return [group for group in (*texts.values(), *groups.values()) if len(group) > 1]


def _of_column(table: Table, options: DataOptions, examples: Examples) -> Groups:
    """Rows with the same value in the column of the group; an empty one is no group."""
    groups: dict[str, list[int]] = {}
    for i in examples if options.group else ():
        if value := table.rows[i][options.group].strip():
            groups.setdefault(value, []).append(i)
    return [group for group in groups.values() if len(group) > 1]


# --- sides


def _given(table: Table, options: DataOptions, examples: Examples) -> dict[int, str]:
    if options.split_column:
        return said_sides({i: table.rows[i][options.split_column] for i in examples}, table.lines, options.split_column)
    assert table.sides is not None
    return {i: table.sides[i] for i in examples}


def _sides(
    table: Table, kind: Kind, options: DataOptions, mode: str, given: dict[int, str] | None, kept: Examples,
    together: Groups, done: Divided, seed: int,
) -> dict[int, str]:  # fmt: skip
    shares = {side: float(getattr(options, side)) for side in SPLITS[1:]}
    if mode == "time":
        values = [table.rows[i][options.time] for i in kept]
        times = read_times(values, [table.lines[i] for i in kept], options.time)
        return by_time(dict(zip(kept, times, strict=True)), **shares)
    if given is None:
        return by_chance(kept, together, kind.labels, **shares, seed=seed)
    side_of = {i: given[i] for i in kept}
    lacking = [side for side in SPLITS[1:] if side not in set(given.values())]
    if lacking:
        leaks = leaking(together, side_of)
        train = {i: e for i, e in kept.items() if side_of[i] == "train" and i not in leaks}
        shares = {side: share if side in lacking else 0.0 for side, share in shares.items()}
        side_of |= by_chance(train, [g for g in together if set(g) <= set(train)], kind.labels, **shares, seed=seed)
        done.notes.append(f"{' and '.join(lacking)} rows are taken from train, since none are given")
    return side_of


def _count_known(done: Divided, share: float) -> None:
    """Say how many rows of a side have a text that an earlier side has too, where they were left there."""
    groups = near_duplicates([normalised(e.text) for e in done.examples], share)
    side_of = {k: side for side, rows in done.sides.items() for k in rows}
    for n, side in enumerate(SPLITS[1:], 1):
        there = [[side_of[k] for k in group] for group in groups]
        known = sum(sides.count(side) for sides in there if set(sides) & set(SPLITS[:n]))
        if known:
            earlier = " or ".join(SPLITS[:n])
            done.notes.append(
                f"{known} of {len(done.sides[side])} {side} rows have the same or nearly the same text in {earlier}: "
                "figures on them are better than on new texts"
            )


# --- balance


def _balanced_first(kept: Examples, together: Groups, done: Divided, seed: int) -> tuple[Examples, Groups]:
    """As many rows of each class, before anything is divided."""
    before = Counter(e.label for e in kept.values())
    chosen = set(undersampled({i: e.label for i, e in kept.items()}, seed))
    done.left_out = [e.line for i, e in kept.items() if i not in chosen]
    rare, share = min(before.items(), key=lambda item: item[1])
    done.notes.append(
        f"classes are of one size on the test side too, where {rare!r} is 1 row in {len(before)}; in the file it is "
        f"{share / len(kept):.1%}. Among rows as they come, precision for {rare!r} will be lower than the test figures say"
    )
    groups = [[i for i in group if i in chosen] for group in together]
    return {i: e for i, e in kept.items() if i in chosen}, [g for g in groups if len(g) > 1]


def _balance(done: Divided, options: DataOptions, table: Table, seed: int) -> None:
    """Of the training rows alone (T28)."""
    train = done.sides["train"]
    labels = {k: done.examples[k].label for k in train}
    if options.balance == "undersample":
        chosen = set(undersampled(labels, seed))
        done.left_out = [done.examples[k].line for k in train if k not in chosen]
        done.sides["train"] = sorted(chosen)
    elif options.balance == "oversample":
        done.sides["train"] = oversampled(labels, seed)
        done.repeated = len(done.sides["train"]) - len(train)
    elif options.balance == "class_weights":
        done.weights = class_weights(labels.values())
    elif table.prepared is not None:
        done.weights = table.prepared.get("class_weights")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"
