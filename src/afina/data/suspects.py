"""Rows whose label may be wrong: listed for a person to look at, never dropped.

As confident learning does (Northcutt et al. 2021): each row is answered by a classifier that did not see it, and is a
suspect where another class is at least as likely as it is, on average, for the rows of that class. The classifier counts
words; its scores, which add up over words as if these were independent, are scaled by the root of their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from afina.data.example import Example
from afina.data.terms import WordCounts, terms

__all__ = ["Suspects", "suspected"]

_FOLDS = 5
_MOST_ROWS = 20_000
_MOST_CELLS = 50_000_000  # classes times terms: what the classifier holds
_LISTED = 200
_LETTERS = 200  # of the text of a suspect that are kept
_TOO_MANY = 0.1  # of the rows: then words tell the classes apart too badly to doubt a label


@dataclass
class Suspects:
    """What was found; the surest come first."""

    count: int = 0
    rows: list[dict[str, object]] = field(default_factory=list)  # line, label, likely, probability, text
    left_out: str = ""  # why nothing was looked for


def suspected(examples: Sequence[Example], seed: int) -> Suspects:
    """Examples with one class each; the same seed gives the same folds."""
    if len(examples) > _MOST_ROWS:
        return Suspects(left_out=f"not looked for among more than {_MOST_ROWS:,} rows")
    labels = sorted({e.label for e in examples})
    number = {label: i for i, label in enumerate(labels)}
    vocabulary: dict[str, int] = {}
    rows = [[vocabulary.setdefault(term, len(vocabulary)) for term in terms(e.text)] for e in examples]
    if len(labels) * len(vocabulary) > _MOST_CELLS:
        return Suspects(left_out=f"not looked for with {len(labels):,} classes and {len(vocabulary):,} terms")
    targets = np.array([number[e.label] for e in examples])
    answers = np.zeros((len(rows), len(labels)), np.float32)
    folds = np.random.default_rng(seed).permutation(len(rows)) % _FOLDS
    for fold in range(_FOLDS):
        known = np.flatnonzero(folds != fold).tolist()
        counted = WordCounts([rows[i] for i in known], targets[known].tolist(), len(vocabulary), len(labels))
        for i in np.flatnonzero(folds == fold).tolist():
            scores = counted.scores(rows[i]) / max(1, len(rows[i])) ** 0.5
            answers[i] = np.exp(scores - scores.max())
    answers /= answers.sum(axis=1, keepdims=True)
    own = np.array([answers[targets == k, k].mean() for k in range(len(labels))])
    likely = answers.argmax(axis=1)
    each = np.arange(len(rows))
    found = np.flatnonzero((likely != targets) & (answers[each, likely] >= own[likely]))
    if len(found) > _TOO_MANY * len(rows):
        right = float((likely == targets).mean())
        return Suspects(left_out=f"not told, since words alone answer but {right:.0%} of the rows as they are labelled")
    found = found[np.argsort(answers[found, targets[found]] - answers[found, likely[found]], kind="stable")]
    listed: list[dict[str, object]] = [
        {
            "line": examples[i].line,
            "label": examples[i].label,
            "likely": labels[likely[i]],
            "probability": round(float(answers[i, likely[i]]), 3),
            "text": examples[i].text[:_LETTERS],
        }
        for i in found[:_LISTED].tolist()
    ]
    return Suspects(len(found), listed)
