"""Words of a text, and which piece of the tokenizer begins each of them.

Words meet the tokenizer as one text, joined by spaces, and pieces find their word by their characters. This holds for every
fast tokenizer, those of byte-level kind too, which would have to be built anew (`add_prefix_space`) to take a list of words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from afina.errors import ConfigError

__all__ = ["first_pieces", "first_seen", "joined", "need_offsets", "split_words", "words_of_pieces"]

Span = tuple[int, int]
_WORD = re.compile(r"https?://\S+|[@#]?\w+|\S")


def split_words(text: str) -> list[Span]:
    """Where words and signs of punctuation begin and end; accents written as letters of their own stay in their word."""
    shadow = "".join("x" if unicodedata.category(letter)[0] == "M" else letter for letter in text)
    return [match.span() for match in _WORD.finditer(shadow)]


def joined(words: Sequence[str]) -> tuple[str, list[Span]]:
    """The words as one text, and where each is in it."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans


def need_offsets(tokenizer: Any) -> None:
    """Raise ConfigError where a tokenizer cannot say which characters its pieces stand for."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {type(tokenizer).__name__} cannot say which characters its pieces stand for; this task needs a "
            "fast one (a folder or hub id with a tokenizer.json)"
        )


def words_of_pieces(text: str, words: Sequence[Span], pieces: Sequence[Span]) -> list[int]:
    """For each piece the number of the word that it begins in, else -1. `pieces` hold (0, 0) for special tokens.

    A piece that begins with the space before a word belongs to the word. One that holds several words belongs to the first.
    """
    of_letter = {}
    for number, (start, end) in enumerate(words):
        of_letter.update(dict.fromkeys(range(start, end), number))
    found = []
    for start, end in pieces:
        while start < end and text[start].isspace():
            start += 1
        found.append(of_letter.get(start, -1) if start < end else -1)
    return found


def first_seen(numbers: Sequence[int]) -> list[int]:
    """The same, -1 for all pieces of a word but the first."""
    found, seen = [], -1
    for number in numbers:
        found.append(number if number > seen else -1)
        seen = max(seen, number)
    return found


def first_pieces(text: str, words: Sequence[Span], pieces: Sequence[Span]) -> list[int]:
    """For each piece the number of the word that it is the first piece of, else -1; see `words_of_pieces`."""
    return first_seen(words_of_pieces(text, words, pieces))
