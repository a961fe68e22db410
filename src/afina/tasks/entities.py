"""Tags of words and the entities they spell: which scheme, which sequences are legal, and how well two readings agree.

Four ways of tagging are known. In IOB2 an entity begins with B- and goes on with I-; in IOB1 (CoNLL 2003) it begins with
I-, and with B- only next to another of its type; in BIOES its last word is E- and a lone word S- (BILOU and BMES are the
same in other letters); plain tags have no prefix. Of plain tags with an O among them, neighbouring words of one tag are one
entity; where no word is O (parts of speech), every word stands for itself.

Sequences that break their scheme are read as conlleval and seqeval read them: an entity begins wherever the tag cannot go on
from the one before. The scores are those of seqeval; a test compares them, but it is not needed (it brings scipy).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

__all__ = ["Scheme", "find_scheme", "legal_path", "scores"]

Entity = tuple[str, int, int]  # type, first word, one past the last word
_LETTERS = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S", "M": "I"}
_IMPOSSIBLE = -1e4  # log probability of an illegal step: never taken where there is a legal one


class Scheme:
    """How tags spell entities; `name` is IOB1, IOB2, BIOES, IO, or plain."""

    def __init__(self, name: str):
        self.name = name

    def parsed(self, tag: str) -> tuple[str, str]:
        """Letter (B, I, E, S or O) and type of a tag."""
        if tag == "O" and self.name != "plain":
            return "O", ""
        if self.name == "plain":
            return "S", tag
        if self.name == "IO":
            return "I", tag
        match = re.fullmatch(r"([BIESLUM])(?:[-_](.*))?", tag, re.S)
        if match is None:  # of another scheme, in rows that were not looked at: a word by itself
            return "S", tag
        return _LETTERS[match[1]], match[2] or ""

    def entities(self, tags: Sequence[str]) -> list[Entity]:
        """The entities in the tags of one text, in order."""
        found: list[Entity] = []
        before, start = ("O", ""), 0
        for i, tag in enumerate([*tags, None]):
            now = ("O", "") if tag is None else self.parsed(tag)
            goes_on = now[0] in "IE" and before[0] in "BI" and now[1] == before[1]
            if before[0] != "O" and not goes_on:
                found.append((before[1], start, i))
            if not goes_on:
                start = i
            before = now
        return found

    def legal(self, before: str | None, after: str | None) -> bool:
        """Whether one tag may follow another; None stands for the beginning and the end of a text."""
        if self.name in ("plain", "IO"):
            return True
        was, here = ("O", "") if before is None else self.parsed(before), ("O", "") if after is None else self.parsed(after)
        goes_on = here[0] in "IE" and was[0] in "BI" and was[1] == here[1]
        if self.name == "IOB1":
            return here[0] != "B" or (was[0] != "O" and was[1] == here[1])
        if self.name == "IOB2":
            return here[0] != "I" or goes_on
        return goes_on if was[0] in "BI" else here[0] in "OBS"

    def illegal(self, tags: Sequence[str]) -> bool:
        """Whether the tags of a text break the scheme."""
        return not all(self.legal(a, b) for a, b in zip([None, *tags], [*tags, None], strict=True))


def find_scheme(sequences: Iterable[Sequence[str]]) -> tuple[Scheme, int]:
    """The scheme of the tags of many texts, and how many of the texts break it."""
    texts = [list(tags) for tags in sequences]
    tags = {tag for text in texts for tag in text}
    letters = {m[1] if (m := re.fullmatch(r"([BIESLUM])[-_].+", tag, re.S)) else tag for tag in tags - {"O"}}
    if not letters or not letters <= set(_LETTERS) or not letters & set("BISU"):
        return Scheme("IO" if "O" in tags else "plain"), 0
    if letters <= {"B", "I"}:
        counted = [(sum(scheme.illegal(text) for text in texts), scheme) for scheme in (Scheme("IOB2"), Scheme("IOB1"))]
        illegal, chosen = min(counted, key=lambda pair: pair[0])
        return chosen, illegal
    chosen = Scheme("BIOES")
    return chosen, sum(chosen.illegal(text) for text in texts)


def legal_path(probabilities: np.ndarray, labels: Sequence[str], scheme: Scheme) -> list[int]:
    """The likeliest legal sequence of tags (Viterbi), from probabilities `[words, tags]`."""
    if not len(probabilities):
        return []
    scores = np.log(np.clip(probabilities.astype(np.float64), 1e-30, None))
    begin, steps, end = _steps(scheme.name, tuple(labels))
    best = scores[0] + begin
    back = np.zeros(scores.shape, dtype=np.int64)
    for i in range(1, len(scores)):
        options = best[:, None] + steps  # [tag before, tag]
        back[i] = options.argmax(axis=0)
        best = options.max(axis=0) + scores[i]
    path = [int((best + end).argmax())]
    for i in range(len(scores) - 1, 0, -1):
        path.append(int(back[i][path[-1]]))
    return path[::-1]


@cache
def _steps(name: str, labels: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log probabilities of tags being first `[tags]`, following each other `[before, after]`, and being last `[tags]`."""
    scheme, around = Scheme(name), (None, *labels)
    made = np.array([[0.0 if scheme.legal(a, b) else _IMPOSSIBLE for b in around] for a in around])
    return made[0, 1:], made[1:, 1:], made[1:, 0]


def scores(truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]], scheme: Scheme) -> dict[str, Any]:
    """Precision, recall and F1 of entities over all texts (micro), their macro average, and those of each type; the
    share of words with the right tag. An entity is right where type, first and last word are.

    What was never answered has precision 0, what is not there recall 0, as in seqeval.
    """
    right, answered, present = Counter[str](), Counter[str](), Counter[str]()
    words = hits = 0
    for tags, found in zip(truth, answers, strict=True):
        true, given = set(scheme.entities(tags)), set(scheme.entities(found))
        present.update(kind for kind, _, _ in true)
        answered.update(kind for kind, _, _ in given)
        right.update(kind for kind, _, _ in true & given)
        words += len(tags)
        hits += sum(a == b for a, b in zip(tags, found, strict=True))
    kinds = sorted(present.keys() | answered.keys())
    per_type = {kind: {**_ratios(right[kind], answered[kind], present[kind]), "entities": present[kind]} for kind in kinds}
    return {
        **_ratios(right.total(), answered.total(), present.total()),
        "macro_f1": sum(per_type[kind]["f1"] for kind in kinds) / len(kinds) if kinds else 0.0,
        "accuracy": hits / words if words else 0.0,
        "entities": present.total(),
        "per_type": per_type,
    }


def _ratios(right: int, answered: int, present: int) -> dict[str, float]:
    precision, recall = right / answered if answered else 0.0, right / present if present else 0.0
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}
