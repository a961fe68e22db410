"""A query, the passage that answers it, and passages that do not: rows of embeddings and of rerankers.

A passage that stands as wrong in one row, or meets the query in a batch by chance, may be the right one of the same query in
another row. So texts are counted through, the same number for the same text wherever it stands, and each query knows
the numbers of all its right passages: none of them is ever held against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from afina.data.clean import normalised
from afina.data.example import Column, Example
from afina.errors import shortened

__all__ = ["NEGATIVES", "PASSAGES", "QUERIES", "Numbered", "numbered", "passages_in"]

QUERIES = ("text", "text_a", "text1", "sentence1", "sentence_a", "anchor", "query", "question")
PASSAGES = (
    "text_pair", "text_b", "text2", "sentence2", "sentence_b", "positive", "passage", "document", "answer", "context",
)  # fmt: skip
NEGATIVES = Column(
    "passages that do not answer it: one, or a list", ("negatives", "negative", "hard_negatives", "negative_passages"),
    required=False, structured=True, asked=False,
)  # fmt: skip
NO_TEXT = -1


def passages_in(cell: str) -> tuple[str, ...]:
    """The texts of a cell: a JSON list of them, or one. Raises ValueError saying what was found and expected."""
    if not cell.startswith("["):
        return (cell,) if cell else ()
    try:
        listed = json.loads(cell)
    except (json.JSONDecodeError, RecursionError):
        return (cell,)  # a text that begins with a bracket
    if wrong := [text for text in listed if not isinstance(text, str)]:
        raise ValueError(f'the negatives hold {json.dumps(wrong[0])[:40]}; expected a text or a list, ["...", "..."]')
    return tuple(text.strip() for text in listed if text.strip())


@dataclass(frozen=True)
class Numbered:
    """The texts of examples by number."""

    rows: list[list[int]]  # of each example: its query, its passage (-1: none), its wrong passages
    right: list[list[int]]  # of each example: all right passages of its query, ascending
    texts: list[str]  # by number

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """What is to be told of wrong passages that are right ones of the same query."""
        both = [e.line for e, row, right in zip(examples, self.rows, self.right, strict=True) if set(row[2:]) & set(right)]
        if not both:
            return []
        rows = f"{len(both)} row{'s name' if len(both) > 1 else ' names'}"
        what = "a right passage of the same query among the wrong ones; it is not held against the query"
        return [f"{rows} {what} (line {shortened(both, 5)})"]


def numbered(examples: Sequence[Example], right: Mapping[str, bool] | None = None) -> Numbered:
    """Texts counted through. `right` says for labels whether they make the passage of their row a right one; None: it is in
    every row that has one."""
    seen: dict[str, int] = {}
    texts = list[str]()

    def number(text: str | None) -> int:
        if text is None:
            return NO_TEXT
        known = seen.setdefault(normalised(text), len(seen))
        if known == len(texts):
            texts.append(text)
        return known

    rows = [[number(text) for text in example.value or (example.text, None)] for example in examples]
    of_query: dict[int, set[int]] = {}
    for example, row in zip(examples, rows, strict=True):
        own = of_query.setdefault(row[0], set())
        if row[1] != NO_TEXT and (right is None or right.get(example.label, False)):
            own.add(row[1])
    ordered = {query: sorted(own) for query, own in of_query.items()}
    return Numbered(rows, [ordered[row[0]] for row in rows], texts)
