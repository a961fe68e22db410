"""Texts with marks in them: entities that were found, missed or wrong, and answers in their context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from afina.report.cells import Tagged, answers_in, number_in, tagged
from afina.report.folder import Row, RunFolder
from afina.report.markup import Markup, Node, cut, el, text_of_user
from afina.report.words import counted, percent
from afina.tasks.entities import Entity, Scheme

__all__ = ["mistaken_answers", "mistaken_tags"]

Page = Callable[[Row, Tagged, Sequence[Entity], Sequence[Entity]], Markup]
SHOWN = 20
_WORDS = 120  # of a text that is shown
_AROUND = 160  # characters of the context around an answer
_KEY = (("hit", "found"), ("missed", "missed"), ("extra", "answered, but not so"))


def _legend(names: Sequence[tuple[str, str]] = _KEY) -> Markup:
    return el("p", *(Markup(el("mark", name, class_=class_) + " ") for class_, name in names), class_="note")


def mistaken_tags(run: RunFolder, page: Page | None = None, most: int = SHOWN) -> Markup:
    """Sentences with most mistakes, their entities marked. `page` shows what they stand on, given what was missed and what
    was answered wrongly."""
    scheme, found = Scheme(str(run.test.get("scheme", "plain"))), []
    for row in run.rows:
        said = tagged(run, row)
        true, given = scheme.entities(said.true), scheme.entities(said.answered)
        missed, extra = [e for e in true if e not in given], [e for e in given if e not in true]
        if missed or extra:
            found.append((len(missed) + len(extra), row, said, [e for e in true if e in given], missed, extra))
    if not found:
        return el("p", f"None: all {counted(len(run.rows), 'test row')} are tagged right.")
    found.sort(key=lambda made: -made[0])
    items = []
    for _, row, said, hits, missed, extra in found[:most]:
        counts = [f"{len(these)} {name}" for these, name in ((hits, "found"), (missed, "missed"), (extra, "wrong")) if these]
        verdict = el("p", f"{', '.join(counts)} · line {row.line}", class_="verdict")
        seen = page(row, said, missed, extra) if page is not None else None
        items.append(el("li", seen, _sentence(said.words, hits, missed, extra), verdict))
    count = counted(len(found), "row")
    shown = f"The {most} of {count} with the most mistakes" if len(found) > most else f"{count.capitalize()} with mistakes"
    said_all = f"{shown}, each entity with its type."
    if scheme.name == "plain":
        said_all = f"{shown}; each word is marked that has or was given another tag."
    return el("div", el("p", said_all), _legend(_KEY if scheme.name != "plain" else _KEY[1:]),
              el("ol", *items, class_="mistakes"))  # fmt: skip


def _sentence(words: Sequence[str], hits: Sequence[Entity], missed: Sequence[Entity], extra: Sequence[Entity]) -> Markup:
    """The words, with marks around entities; one that is missed and answered otherwise carries both marks."""
    if len(hits) > len(words) / 2:  # of plain tags, the right ones are not worth a mark
        hits = []
    marks = [("hit", e) for e in hits] + [("missed", e) for e in missed] + [("extra", e) for e in extra]
    first = max(0, min((e[1] for _, e in marks), default=0) - 10) if len(words) > _WORDS else 0
    last = min(len(words), first + _WORDS)
    nodes: list[Node] = ["… "] if first else []
    i = first
    while i < last:
        here = [(class_, e) for class_, e in marks if e[1] <= i < e[2]]
        edges = [edge for _, e in marks for edge in e[1:] if edge > i]
        end = min([last, *edges]) if here or edges else last
        text = " ".join(cut(word, 80) for word in words[i:end])
        for class_, e in here:
            label = el("sub", cut(e[0], 30)) if e[2] == end or end == last else None
            text = el("mark", text, label, class_=class_)
        nodes += [text, " "]
        i = end
    if last < len(words):
        nodes.append(f"… ({len(words) - last} more words)")
    return el("p", *nodes, class_="text", dir="auto")


def mistaken_answers(run: RunFolder) -> Markup:
    """Questions that were not answered exactly, the surest first, with both answers in the context."""
    wrong = [row for row in run.rows if not row.right]
    if not wrong:
        return el("p", f"None: all {counted(len(run.rows), 'question')} are answered exactly.")
    wrong.sort(key=lambda row: -(number_in(row.more.get("probability", "")) or 0.0))
    items = [_question(row) for row in wrong[:SHOWN]]
    count = counted(len(wrong), "question")
    shown = f"The {SHOWN} of {count}" if len(wrong) > SHOWN else count.capitalize()
    return el(
        "div",
        el("p", f"{shown} not answered exactly, the surest first; an answer may be right in other words."),
        _legend((("missed", "right answer"), ("extra", "given answer"), ("hit", "both"))),
        el("ol", *items, class_="mistakes"),
    )


def _question(row: Row) -> Markup:
    context, right = row.given.get("text_pair", ""), answers_in(row.given.get("label", ""))
    spans: list[tuple[str, int, int]] = []
    if right:
        text, start = right[0]
        start = start if start is not None and context[start : start + len(text)] == text else context.find(text)
        if start >= 0:
            spans.append(("missed", start, start + len(text)))
    low, high = (number_in(row.more.get(key, "")) for key in ("start", "end"))
    if low is not None and high is not None:
        spans.append(("extra", int(low), int(high)))
    said = number_in(row.more.get("probability", ""))
    sure = f" {percent(said)}" if said is not None else ""
    wanted = cut("; ".join(dict.fromkeys(text for text, _ in right)), 200) or "no answer"
    return el(
        "li",
        el("p", el("b", cut(row.given.get("text", ""), 400)), class_="text", dir="auto"),
        _excerpt(context, spans) if spans else text_of_user(context),
        el("p", "answered ", el("b", cut(row.answer, 200), dir="auto"), f"{sure}, right ", el("b", wanted, dir="auto"),
           f" · line {row.line}", class_="verdict"),
    )  # fmt: skip


def _excerpt(context: str, spans: Sequence[tuple[str, int, int]]) -> Markup:
    """The context around both answers; what lies far between them is left out."""
    edges = sorted({0, len(context), *(edge for _, a, b in spans for edge in (a, b))})
    nodes: list[Node] = []
    for a, b in pairwise(edges):
        here = {class_ for class_, low, high in spans if low <= a and b <= high}
        piece = context[a:b]
        if here:
            nodes.append(el("mark", cut(piece, 600), class_="hit" if len(here) > 1 else here.pop()))
            continue
        before, after = (piece[:_AROUND] if a else ""), (piece[-_AROUND:] if b < len(context) else "")
        if len(piece) <= len(before) + len(after) + 20:
            nodes.append(piece)
        else:
            nodes.append(f"{before} … {after}".lstrip())
    return el("p", *nodes, class_="text", dir="auto")
