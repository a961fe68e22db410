"""Transcripts: how they are spelled before they are learned, and how far a written one is from what was said.

Word and character error rates are jiwer's: substitutions, deletions and insertions over the words (characters) expected.
They are counted over plain words, in small letters and without punctuation, and once more as everything is written.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from afina.errors import MissingDependencyError

__all__ = ["CASES", "check_jiwer", "error_rates", "plain_words", "spelled", "word_errors"]

CASES = ("as_written", "lower", "upper")
_CURLED = "\N{RIGHT SINGLE QUOTATION MARK}"


def check_jiwer() -> None:
    """Raise MissingDependencyError where jiwer is not installed."""
    try:
        import jiwer  # noqa: F401
    except ImportError:
        raise MissingDependencyError("jiwer", "speech", "comparing transcripts") from None


def spelled(text: str, case: str = "as_written", punctuation: bool = True) -> str:
    """A transcript as it is learned: one space between words, its letters small or capital, its punctuation left out."""
    text = text.lower() if case == "lower" else text.upper() if case == "upper" else text
    return " ".join((text if punctuation else _without_punctuation(text)).split())


def plain_words(text: str) -> str:
    """Words in small letters, without punctuation, one space between them."""
    return spelled(text.casefold(), punctuation=False)


def _without_punctuation(text: str) -> str:
    """Apostrophes stay: they are part of a word."""
    text = text.replace(_CURLED, "'")
    return "".join(" " if c != "'" and unicodedata.category(c)[0] in "PSZC" else c for c in text)


def word_errors(right: str, answer: str) -> tuple[int, int]:
    """Wrong, missing and additional plain words of an answer, and how many words were expected."""
    import jiwer

    right, answer = plain_words(right), plain_words(answer)
    if not right:
        return len(answer.split()), 0
    found = jiwer.process_words(right, answer)
    return found.substitutions + found.deletions + found.insertions, len(right.split())


def error_rates(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Figures "wer" and "cer" of plain words and "wer_as_written", each over all words or characters; rows that say
    nothing are left out."""
    import jiwer

    found = {}
    plain = [(plain_words(right), plain_words(answer)) for right, answer in zip(references, answers, strict=True)]
    for names, pairs in ((("wer", "cer"), plain), (("wer_as_written",), list(zip(references, answers, strict=True)))):
        there = [pair for pair in pairs if pair[0].strip()]
        right, said = [pair[0] for pair in there], [pair[1] for pair in there]
        for name in names:
            rate = jiwer.cer if name == "cer" else jiwer.wer
            found[name] = float(rate(right, said)) if there else 0.0
    return found
