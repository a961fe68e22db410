"""One row as a task sees it, and what reading, cleaning and dividing must know of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.data.media import Medium

__all__ = ["ROLES", "Column", "Example", "Kind", "UnusableError"]

# keys of `data` in a recipe that name columns
ROLES = ("text", "boxes", "page_size", "image", "audio", "text_pair", "negatives", "label")


class UnusableError(Exception):
    """A row that nothing can be learned from, though it is written as it should be; the message says why."""


@dataclass(frozen=True, slots=True)
class Example:
    """One usable row, with the line of the file it came from.

    `text` is all of the input: what may not stand on two sides of a split, exactly or nearly; a path in it becomes a digest
    of what the file holds, when the rows of a file are made examples. `label` is the target as
    text; what it means is said by `Kind.labels`. `value` is what the task makes of the row, where that is more than a text
    and a label. Examples of one `group` stay on one side.
    """

    text: str
    label: str
    line: int | str
    value: Any = None
    group: str = ""
    row: Mapping[str, str] = field(default_factory=dict)  # by role, as it was cleaned; set by `divided`, not by `Kind.make`


@dataclass(frozen=True)
class Column:
    """A column that a task reads."""

    help: str
    names: tuple[str, ...] = ()  # taken, in this order, where the recipe names none
    required: bool = True
    structured: bool = False  # may hold a list or an object; `Kind.make` then gets it as JSON
    repair: bool = True  # repairing letters and white space changes nothing else (no offsets point into it)
    medium: Medium | None = None  # a path of such a file, relative to the file that names it
    asked: bool = True  # whether the model is given it when it is asked; never so for the label


@dataclass(frozen=True)
class Kind:
    """What a row of a task consists of.

    `make(row, line)` gets the row by role (`text`, `text_pair`, `label`; stripped text) and returns the example. The label
    is absent when a model is asked, and then the example's is "". An example without text or, in a file to train on,
    without label is dropped and counted. It raises ValueError where the row cannot be what the task expects, saying what
    was found and expected; all such rows are told together. It raises UnusableError where the row is as expected and yet
    teaches nothing; such rows are dropped and counted.

    `labels`: "class" (spelling is repaired, one text under two labels is dropped, splits keep the shares of classes),
    "classes" (several, joined by a comma), "number", "text" (one input may have several right answers: all are kept, on one
    side), or "none" (the text is all there is).
    """

    columns: Mapping[str, Column]
    labels: str
    make: Callable[[Mapping[str, str], int | str], Example]
    read: Callable[[Path], Any] | None = None  # a form of file of its own: a Table, or None where it is not
    check: Callable[[Mapping[str, str]], str | None] | None = None  # what is wrong with columns by role, if anything
    held_out: bool = True  # rows are kept apart to be tested on; False: all are learned from, and tested on one of a group

    @property
    def media(self) -> dict[str, Medium]:
        """Roles of the columns that hold paths."""
        return {role: column.medium for role, column in self.columns.items() if column.medium is not None}

    @property
    def input(self) -> str:
        """The role of the first column: what a row must have to be answered."""
        return next(iter(self.columns))

    @property
    def of_text(self) -> bool:
        """Whether the input is a text; files may go with it."""
        return self.columns[self.input].medium is None

    @property
    def what(self) -> str:
        """What the input is called: text, picture, recording."""
        medium = self.columns[self.input].medium
        return "text" if medium is None else medium.name
