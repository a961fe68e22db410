"""How well two answers agree, as SQuAD scores it, and an answer found without a model.

Answers are compared without case, punctuation, articles and white space. `en` is SQuAD's own rule: the punctuation of ASCII,
and a, an, the. Other languages follow MLQA (Lewis et al. 2020): all of Unicode's punctuation and the language's articles;
`none` knows no articles. F1 counts words between white space, so it says little for languages that write without.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

__all__ = ["ARTICLES", "best_overlap", "exact_match", "f1", "normalised_answer"]

ARTICLES = {
    "en": ("a", "an", "the"),
    "es": ("un", "una", "unos", "unas", "el", "la", "los", "las"),
    "de": ("ein", "eine", "einen", "einem", "eines", "einer", "der", "die", "das", "den", "dem", "des"),
    "none": (),
}
_NEAR = 12  # words around a guess that are compared with the question
_GUESS = 6  # words of a guess


def normalised_answer(text: str, language: str = "en") -> str:
    """The form in which two answers count as the same."""
    lowered = text.lower()
    kept = "".join(c for c in lowered if not _is_punctuation(c, language))
    articles = ARTICLES[language]
    if articles:
        kept = re.sub(rf"\b({'|'.join(articles)})\b", " ", kept)
    return " ".join(kept.split())


def _is_punctuation(letter: str, language: str) -> bool:
    return letter in string.punctuation or (language != "en" and unicodedata.category(letter)[0] == "P")


def exact_match(answer: str, truths: Sequence[str], language: str = "en") -> float:
    """1 where the answer is one of the truths; no truths: where it is empty."""
    found = normalised_answer(answer, language)
    return float(any(found == normalised_answer(truth, language) for truth in truths or [""]))


def f1(answer: str, truths: Sequence[str], language: str = "en") -> float:
    """Words that answer and truth share, as F1; the best over the truths. No truths: 1 where the answer is empty."""
    found = normalised_answer(answer, language).split()
    return max(_f1(found, normalised_answer(truth, language).split()) for truth in truths or [""])


def _f1(found: list[str], true: list[str]) -> float:
    if not found or not true:
        return float(found == true)
    shared = (Counter(found) & Counter(true)).total()
    return 2 * shared / (len(found) + len(true))


def best_overlap(question: str, context: str) -> tuple[int, int]:
    """Where the guess of a sliding window begins and ends: of the stretches of words that are not in the question, the one
    with most of the question's rare words close by in its sentence (after Richardson et al. 2013)."""
    words = [(m.start(), m.end(), m[0].casefold()) for m in re.finditer(r"\w+", context)]
    if not words:
        return 0, 0
    counts = Counter(word for _, _, word in words)
    asked = set(re.findall(r"\w+", question.casefold()))
    weight = [math.log(1 + len(words) / counts[word]) if word in asked else 0.0 for _, _, word in words]
    best, chosen = -1.0, (0, 0)
    sentence = [len(re.findall(r"[.!?](?=\s)", context[:start])) for start, _, _ in words]
    first = 0
    while first < len(words):
        last = first
        while (
            not weight[last] and last + 1 < len(words) and not weight[last + 1] and last + 1 - first < _GUESS
            and context[words[last][1] : words[last + 1][0]].isspace()
        ):  # fmt: skip
            last += 1
        if not weight[first]:
            closeness: dict[str, float] = {}
            for i in range(max(0, first - _NEAR), min(len(words), last + 1 + _NEAR)):
                if weight[i] and sentence[i] == sentence[first]:
                    near = weight[i] / (1 + max(first - i, i - last, 0) / _NEAR)
                    closeness[words[i][2]] = max(closeness.get(words[i][2], 0.0), near)
            if sum(closeness.values()) > best:
                best, chosen = sum(closeness.values()), (first, last)
        first = last + 1
    return words[chosen[0]][0], words[chosen[1]][1]
