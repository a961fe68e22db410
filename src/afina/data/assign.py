"""Says which side each row is on: by chance within each class, by time, or as files or a column say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from afina.data.clean import names_in
from afina.data.example import Example
from afina.data.read import NAMES, SPLITS
from afina.data.split import shares_of, stratified
from afina.errors import DataError, shortened

__all__ = ["by_chance", "by_time", "last_first", "leaking", "said_sides"]

Examples = Mapping[int, Example]  # by the number of their row
Groups = Sequence[Sequence[int]]  # numbers of rows that stay together
_BINS = 10  # strata of numbers


def by_chance(
    examples: Examples, together: Groups, labels: str, *, validation: float, test: float, seed: int
) -> dict[int, str]:
    """The side of each row: by chance, with the shares of classes on every side."""
    numbers = list(examples)
    place = {i: k for k, i in enumerate(numbers)}
    groups = [[place[i] for i in group] for group in together]
    parts = stratified(_strata(list(examples.values()), labels), validation=validation, test=test, seed=seed, groups=groups)
    return {numbers[k]: side for side, rows in zip(SPLITS, parts, strict=True) for k in rows}


def by_time(times: Mapping[int, float], *, validation: float, test: float) -> dict[int, str]:
    """The side of each row: the earliest train, the latest test; rows of one time are on one side."""
    order = sorted(times, key=lambda i: (times[i], i))
    n_train, n_held, _ = shares_of(len(order), validation, test)
    cuts: list[int] = []
    for wanted in (n_train, n_train + n_held):
        first = cuts[-1] + 1 if cuts else 1
        begins = [k for k in range(first, len(order)) if times[order[k]] != times[order[k - 1]]]
        if not begins:
            raise DataError("data.time: the rows have too few different times to be divided by them")
        cuts.append(min(begins, key=lambda k: abs(k - wanted)))
    return {i: SPLITS[(k >= cuts[0]) + (k >= cuts[1])] for k, i in enumerate(order)}


def said_sides(values: Mapping[int, str], places: Sequence[int | str], column: str) -> dict[int, str]:
    """The side of each row as a column says it. Raises DataError naming rows that say something else."""
    wrong = {i: value for i, value in values.items() if value.strip().lower() not in NAMES}
    if wrong:
        said = shortened(f"line {places[i]}: {value[:30]!r}" for i, value in list(wrong.items())[:5])
        rows = f"{len(wrong)} row{'s' if len(wrong) > 1 else ''}"
        raise DataError(
            f"data.split_column: in column {column!r}, {rows} say neither train, validation nor test ({said}); also read "
            f"are {', '.join(sorted(set(NAMES) - set(SPLITS)))}"
        )
    return {i: NAMES[value.strip().lower()] for i, value in values.items()}


def last_first(examples: Examples, side_of: Mapping[int, str]) -> dict[int, Example]:
    """Test rows before validation rows before train rows: of copies, the first is kept."""
    return dict(sorted(examples.items(), key=lambda item: (-SPLITS.index(side_of[item[0]]), item[0])))


def leaking(together: Groups, side_of: Mapping[int, str]) -> set[int]:
    """Rows whose text, or one of the same group, is also on a later side."""
    found: set[int] = set()
    for group in together:
        last = max(SPLITS.index(side_of[i]) for i in group)
        found |= {i for i in group if SPLITS.index(side_of[i]) < last}
    return found


def _strata(examples: Sequence[Example], labels: str) -> list[str]:
    """What is to have the same share on every side: the class, the rarest of several classes, the size of a number."""
    if labels == "class":
        return [e.label for e in examples]
    if labels == "classes":
        counts = Counter(name for e in examples for name in names_in(e.label, labels))
        return [min(names_in(e.label, labels), key=lambda name: (counts[name], name), default="") for e in examples]
    strata = [""] * len(examples)
    if labels == "number" and len(examples) >= 3 * _BINS:
        order = sorted(range(len(examples)), key=lambda i: float(examples[i].label))
        for position, i in enumerate(order):
            strata[i] = str(position * _BINS // len(order))
    return strata
