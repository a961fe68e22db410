"""What was said beside what was written: of recordings, those with the most wrong words first."""

from __future__ import annotations

from afina.report.cells import number_in
from afina.report.folder import Row, RunFolder
from afina.report.markup import Markup, el, text_of_user
from afina.report.players import player
from afina.report.words import counted

__all__ = ["misheard", "word_counts"]

_SHOWN = 20


def word_counts(row: Row) -> tuple[float, float] | None:
    """Wrong words of a test row, and words expected; None where nothing was written, or nothing is said."""
    wrong, words = (number_in(row.more.get(key, "")) for key in ("wrong_words", "words"))
    return (wrong, words) if wrong is not None and words else None


def misheard(run: RunFolder) -> Markup:
    """Transcripts in pairs, by their share of wrong words, then by the loss of a token."""
    known = [(row, counts) for row in run.rows if (counts := word_counts(row))]
    if not known:
        return el("p", "No texts were written (task.generate=false).")
    wrong = [(row, counts) for row, counts in known if counts[0]]
    if not wrong:
        return el("p", f"None: all {counted(len(known), 'test row')} are written down without a wrong word.")
    wrong.sort(key=lambda one: (-one[1][0] / one[1][1], -(number_in(one[0].more.get("loss", "")) or 0.0)))
    items = []
    for row, (bad, words) in wrong[:_SHOWN]:
        said = text_of_user(row.answer) if row.answer else el("p", "nothing was written", class_="text note")
        given = row.given
        sides = (("recording", player(given["audio"])), ("right", text_of_user(given["label"])), ("answer", said))
        verdict = f"{counted(round(bad), 'wrong word')}, {words:.0f} expected · line {row.line}"
        items.append(el(
            "li", el("dl", *(node for name, side in sides for node in (el("dt", name), el("dd", side))), class_="sides"),
            el("p", verdict, class_="verdict"),
        ))  # fmt: skip
    told = f"{len(wrong):,} of {counted(len(known), 'recording')} have a wrong word. The {len(items)} with the most."
    return el("div", el("p", told), el("ol", *items, class_="mistakes"))
