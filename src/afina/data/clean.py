"""Drops and repairs examples before they are divided, and counts everything it does.

Done before the split, so that no text is on two sides of it (T27): exact duplicates (in all but case and white space) are
kept once, and a text that stands under two labels is dropped, since nobody can say which is right. Labels that differ in
case or white space alone are one class (T29). Where one input may have several right answers, all are kept.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from afina.data.example import Example
from afina.data.options import CleanOptions
from afina.errors import shortened

__all__ = ["CLASSES", "CleanReport", "clean", "count", "names_in", "normalised"]

CLASSES = ("class", "classes")  # kinds of labels that are names
NO_CLASS = "[]"  # how a label of several classes says that none applies


@dataclass
class CleanReport:
    """What became of the rows of a file; the lists hold line numbers."""

    rows: int = 0
    what: str = "text"  # of which rows are made
    files: list[str] = field(default_factory=list)  # what was done to files as they were read
    broken_files: list[int | str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what is wrong with each of these
    repaired_texts: list[int | str] = field(default_factory=list)
    white_space: list[int | str] = field(default_factory=list)
    empty_texts: list[int | str] = field(default_factory=list)
    missing_labels: list[int | str] = field(default_factory=list)
    unusable: dict[str, list[int | str]] = field(default_factory=dict)  # by the reason
    too_short: list[int | str] = field(default_factory=list)
    duplicates: list[int | str] = field(default_factory=list)
    near_dropped: list[int | str] = field(default_factory=list)
    conflicting_labels: list[int | str] = field(default_factory=list)
    repaired_labels: dict[str, str] = field(default_factory=dict)  # as it was written -> as it is read
    kept: int = 0
    classes: dict[str, int] = field(default_factory=dict)

    def note_repair(self, line: int | str, *, only_space: bool) -> None:
        """Note that a text was repaired; a line is told once of each."""
        lines = self.white_space if only_space else self.repaired_texts
        if not lines or lines[-1] != line:
            lines.append(line)

    def lines(self) -> list[str]:
        """One sentence for each thing that was found."""
        found, it = [*self.files], self.what
        for lines, what in (
            (self.broken_files, f"left out: the {it if it != 'text' else 'file'} cannot be read (data.clean.broken_files)"),
            (self.repaired_texts, "repaired: letters were read in a wrong encoding, or are control characters"),
            (self.white_space, "repaired: runs of white space"),
            (self.empty_texts, f"dropped: there is no {it}" if it != "text" else "dropped: the text is empty"),
            (self.missing_labels, "dropped: the label is missing"),
            *((lines, f"dropped: {why}") for why, lines in self.unusable.items()),
            (self.too_short, "dropped: too few letters (data.clean.min_letters)"),
            (self.duplicates, f"dropped: the same {it} with the same label is there already"),
            (self.near_dropped, f"dropped: nearly the same {it} is there already"),
            (self.conflicting_labels, f"dropped: the same {it} stands under different labels"),
        ):
            if lines:
                found.append(f"{len(lines)} row{'s' if len(lines) > 1 else ''} {what} (line {shortened(lines, 5)})")
        found += [f"  {wrong}" for wrong in self.broken[:10]]
        found += [f"  and {len(self.broken) - 10} more: see data/data_report.json"] if len(self.broken) > 10 else []
        for written, read in self.repaired_labels.items():
            found.append(f"label {written!r} is read as {read!r}")
        return found


def normalised(text: str) -> str:
    """The form in which two texts or labels count as the same."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def clean(examples: Mapping[int, Example], labels: str, options: CleanOptions, report: CleanReport) -> dict[int, Example]:
    """The examples that are kept, by their number and in the order they come in; what was done is put into `report`."""
    kept = {}
    for i, example in examples.items():
        if options.min_letters and sum(map(str.isalnum, example.text)) < options.min_letters:
            report.too_short.append(example.line)
        else:
            kept[i] = example
    if options.label_spelling and labels in CLASSES:
        kept = _one_spelling(kept, labels, report)
    kept = _without_duplicates(kept, labels, options, report)
    count(kept.values(), labels, report)
    return kept


def count(examples: Collection[Example], labels: str, report: CleanReport) -> None:
    """Put how many rows are kept, and of which classes, into the report."""
    report.kept = len(examples)
    names = Counter(name for e in examples for name in names_in(e.label, labels))
    report.classes = dict(sorted(names.items()))


def names_in(label: str, labels: str) -> list[str]:
    """The classes that a label names; none where labels are no classes."""
    if labels == "class":
        return [label]
    names = label.split(",") if labels == "classes" and label != NO_CLASS else []
    return [name.strip() for name in names if name.strip()]


def _one_spelling(examples: dict[int, Example], labels: str, report: CleanReport) -> dict[int, Example]:
    """Give every label the most frequent of its spellings."""
    spellings: dict[str, Counter[str]] = {}
    for example in examples.values():
        for name in names_in(example.label, labels):
            spellings.setdefault(normalised(name), Counter())[name] += 1
    chosen = {key: counts.most_common(1)[0][0] for key, counts in spellings.items()}
    report.repaired_labels = {
        written: chosen[key] for key, counts in spellings.items() for written in sorted(counts) if written != chosen[key]
    }
    if not report.repaired_labels:
        return examples
    repaired = {}
    for i, example in examples.items():
        names = dict.fromkeys(chosen[normalised(name)] for name in names_in(example.label, labels))
        label = ", ".join(sorted(names)) or example.label
        row = {**example.row, "label": label} if labels == "class" and "label" in example.row else example.row
        repaired[i] = replace(example, label=label, row=row)
    return repaired


def _without_duplicates(
    examples: dict[int, Example], labels: str, options: CleanOptions, report: CleanReport
) -> dict[int, Example]:
    def answer(example: Example) -> str:
        if labels == "classes":
            return ",".join(sorted(names_in(example.label, labels)))
        return "" if labels == "none" else example.label.strip()

    answers: dict[str, set[str]] = {}
    keys = {i: normalised(example.text) for i, example in examples.items()}
    for i, example in examples.items():
        answers.setdefault(keys[i], set()).add(answer(example))
    seen: set[tuple[str, str]] = set()
    kept = {}
    for i, example in examples.items():
        key = (keys[i], answer(example))
        if options.conflicts and labels in CLASSES and len(answers[keys[i]]) > 1:
            report.conflicting_labels.append(example.line)
        elif options.duplicates and key in seen:
            report.duplicates.append(example.line)
        else:
            seen.add(key)
            kept[i] = example
    return kept
