"""Repairs the letters of a text: what was read in a wrong encoding, control characters, runs of white space.

ftfy undoes mojibake only where the outcome is surely better ("schÃ¶n" is "schön"); its changes of taste (straight quotes,
HTML entities, ligatures) stay off, since a model may need them as they are.
"""

from __future__ import annotations

import re

from afina.data.options import CleanOptions

__all__ = ["repaired"]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")


def repaired(text: str, options: CleanOptions) -> str:
    """The text with the repairs that are on, and without white space around it."""
    if options.unicode and (not text.isascii() or _CONTROL.search(text)):
        text = _letters(text)
    if options.white_space:
        text = " ".join(text.split())
    return text.strip()


def _letters(text: str) -> str:
    from ftfy import TextFixerConfig, fix_text

    plain = TextFixerConfig(
        unescape_html=False, fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False,
        fix_line_breaks=False, remove_terminal_escapes=False, normalization="NFC", explain=False,
    )  # fmt: skip
    return fix_text(text, plain)
