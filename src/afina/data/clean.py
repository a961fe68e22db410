"""Turns a table into labelled examples, and counts everything that was dropped or repaired on the way.

Done before the split, so that no text is on two sides of it (T27): rows without a text or label are dropped, exact
duplicates (in all but case and white space) are kept once, and a text that stands under two labels is dropped, since
nobody can say which is right. Labels that differ in case or white space alone are one class (T29).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field

from afina.data.table import Table
from afina.errors import DataError, Problems, shortened

__all__ = ["CleanReport", "Example", "clean", "normalised"]


@dataclass(frozen=True)
class Example:
    """One labelled text, with the line of the file it came from."""

    text: str
    label: str
    line: int | str


@dataclass
class CleanReport:
    """What became of the rows of a file; the lists hold line numbers."""

    rows: int = 0
    empty_texts: list[int | str] = field(default_factory=list)
    missing_labels: list[int | str] = field(default_factory=list)
    duplicates: list[int | str] = field(default_factory=list)
    conflicting_labels: list[int | str] = field(default_factory=list)
    repaired_labels: dict[str, str] = field(default_factory=dict)  # as it was written -> as it is read
    kept: int = 0
    classes: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One sentence for each thing that was found."""
        found = []
        for lines, what in (
            (self.empty_texts, "dropped: the text is empty"),
            (self.missing_labels, "dropped: the label is missing"),
            (self.duplicates, "dropped: the same text with the same label is there already"),
            (self.conflicting_labels, "dropped: the same text stands under different labels"),
        ):
            if lines:
                found.append(f"{len(lines)} row{'s' if len(lines) > 1 else ''} {what} (line {shortened(lines, 5)})")
        for written, read in self.repaired_labels.items():
            found.append(f"label {written!r} is read as {read!r}")
        return found


def normalised(text: str) -> str:
    """The form in which two texts or labels count as the same."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def clean(table: Table, text: str, label: str) -> tuple[list[Example], CleanReport]:
    """The usable rows of a table, in file order. Raises DataError where there is nothing to learn from them."""
    report = CleanReport(rows=len(table.rows))
    examples = []
    for line, row in zip(table.lines, table.rows, strict=True):
        if not row[text].strip():
            report.empty_texts.append(line)
        elif not row[label].strip():
            report.missing_labels.append(line)
        else:
            examples.append(Example(row[text].strip(), row[label].strip(), line))
    examples = _one_spelling(examples, report)
    examples = _without_duplicates(examples, report)
    report.kept = len(examples)
    report.classes = dict(sorted(Counter(e.label for e in examples).items()))
    _check_classes(table, label, examples, report)
    return examples, report


def _one_spelling(examples: list[Example], report: CleanReport) -> list[Example]:
    """Give every label the most frequent of its spellings."""
    spellings: dict[str, Counter[str]] = {}
    for example in examples:
        spellings.setdefault(normalised(example.label), Counter())[example.label] += 1
    chosen = {key: counts.most_common(1)[0][0] for key, counts in spellings.items()}
    report.repaired_labels = {
        written: chosen[key] for key, counts in spellings.items() for written in sorted(counts) if written != chosen[key]
    }
    return [Example(e.text, chosen[normalised(e.label)], e.line) for e in examples]


def _without_duplicates(examples: list[Example], report: CleanReport) -> list[Example]:
    labels: dict[str, set[str]] = {}
    for example in examples:
        labels.setdefault(normalised(example.text), set()).add(example.label)
    seen: set[str] = set()
    kept = []
    for example in examples:
        key = normalised(example.text)
        if len(labels[key]) > 1:
            report.conflicting_labels.append(example.line)
        elif key in seen:
            report.duplicates.append(example.line)
        else:
            seen.add(key)
            kept.append(example)
    return kept


def _check_classes(table: Table, label: str, examples: list[Example], report: CleanReport) -> None:
    dropped = "".join(f"\n  {line}" for line in report.lines())
    if not examples:
        raise DataError(f"{table.path} has no row with both a text and a label{dropped}")
    if len(report.classes) == 1:
        raise DataError(
            f"{table.path}: column {label!r} is {examples[0].label!r} in every row; there is nothing to tell apart"
        )
    problems = Problems(f"{table.path}, column {label!r}")
    small = {name: count for name, count in report.classes.items() if count < 3}
    if len(small) > 8 and len(small) > len(report.classes) / 2:
        problems.add(
            f"{len(report.classes)} different values in {len(examples)} rows, most of them rare: is this the label?"
        )
    else:
        for name, count in small.items():
            lines = shortened(e.line for e in examples if e.label == name)
            problems.add(
                f"class {name!r} has {count} row{'s' if count > 1 else ''} (line {lines}); at least 3 are needed, one "
                "each to train, validate and test. Add rows, or rename or remove the class"
            )
    problems.raise_as(DataError)
