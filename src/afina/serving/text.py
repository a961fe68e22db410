"""Tokens to text while they come: what is sent is never taken back.

A piece of text waits where it may still change: half a letter (its bytes come with the next token), letters spelled in bytes
(which some tokenizers read all together or not at all), the beginning of a stop sequence, and, where white space around the
answer is dropped, white space that may be its end.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

__all__ = ["TextStream"]

_HALF = "\ufffd"


class TextStream:
    """The text of one answer. `decode` gives the text of all tokens; `spelled` are tokens that stand for a byte; `stripped`
    drops white space around the answer."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = (), *, spelled: Container[int] = (),
        stripped: bool = False,
    ):  # fmt: skip
        self.decode, self.stops, self.spelled, self.stripped = decode, stops, spelled, stripped
        self.sent = ""
        self.stopped = False  # a stop sequence has come

    def grow(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """What can be sent now that is new."""
        sure = len(tokens)
        while not last and sure and tokens[sure - 1] in self.spelled:
            sure -= 1
        text = self.decode(tokens[:sure])
        if self.stripped:
            text = text.lstrip()
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            text, self.stopped, last = text[: min(places)], True, True
        if not last:
            text = self._sure(text)
        elif self.stripped:
            text = text.rstrip()
        if not text.startswith(self.sent):  # a tokenizer that changes what it has said: go on behind it
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new

    def _sure(self, text: str) -> str:
        text = text.rstrip(_HALF)
        held = 0
        for stop in self.stops:
            longest = min(len(stop) - 1, len(text))
            held = max(held, next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0))
        text = text[: len(text) - held]
        return text.rstrip() if self.stripped else text
