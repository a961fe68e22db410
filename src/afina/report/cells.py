"""What the cells of a test row hold, as its task reads them: words and tags, labels, numbers, answers in a context."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from afina.data.squad import parsed_answers
from afina.report.folder import Row, RunFolder

__all__ = ["TAGGED", "Tagged", "answers_in", "names_in", "number_in", "tagged"]


TAGGED = ("token_classification", "document_token_classification")  # tasks with a tag a word


def names_in(cell: str) -> list[str]:
    """Labels of a cell that may hold several: a list, or between commas, semicolons or bars."""
    if (listed := _listed(cell)) is not None:
        return [" ".join(str(name).split()) for name in listed]
    mark = next((m for m in "|;," if m in cell), None)
    return sorted({" ".join(name.split()) for name in (cell.split(mark) if mark else [cell])} - {""})


def number_in(cell: str) -> float | None:
    """The number in a cell; None for anything else."""
    try:
        return float(cell)
    except ValueError:
        return None


def answers_in(cell: str) -> list[tuple[str, int | None]]:
    """The right answers of a question and their first characters, where they are said; none for none."""
    try:
        return parsed_answers(cell) if cell else []
    except ValueError:
        return []


@dataclass(frozen=True)
class Tagged:
    """The words of a row, their tags, and those that were answered."""

    words: list[str]
    true: list[str]
    answered: list[str]


def tagged(run: RunFolder, row: Row) -> Tagged:
    """A row of token classification; tags that are missing count as none."""
    words, true = (_words(row.given.get(role, "")) for role in ("text", "label"))
    answered = row.more.get("answer_tags", "").split()
    short = lambda tags: [*tags, *["O"] * (len(words) - len(tags))][: len(words)]
    return Tagged(words, short(true), short(answered))


def _words(cell: str) -> list[str]:
    listed = _listed(cell)
    return cell.split() if listed is None else [str(word) for word in listed]


def _listed(cell: str) -> list[Any] | None:
    if not re.match(r"\s*\[", cell):
        return None
    try:
        found = json.loads(cell)
    except ValueError:
        return None
    return found if isinstance(found, list) else None
