"""Answers beside the right ones: numbers, and texts that were written."""

from __future__ import annotations

import json

from afina.report.cells import number_in
from afina.report.folder import Row, RunFolder
from afina.report.markup import Markup, Node, el, text_of_user, texts_of_user
from afina.report.words import counted

__all__ = ["conversation_in", "furthest", "written"]

SHOWN = 20


def furthest(run: RunFolder) -> Markup | None:
    """Rows whose number is furthest from the right one."""
    pairs = [(row, number_in(row.answer), number_in(row.given.get("label", ""))) for row in run.rows]
    there = [(abs(a - b), row, a, b) for row, a, b in pairs if a is not None and b is not None]
    if not there:
        return None
    there.sort(key=lambda made: -made[0])
    items = [
        el("li", texts_of_user(row.given),
           el("p", "answered ", el("b", f"{a:.4g}"), ", right ", el("b", f"{b:.4g}"), f", off by {off:.3g} · ",
              f"line {row.line}", class_="verdict"))
        for off, row, a, b in there[:SHOWN]
    ]  # fmt: skip
    return el("div", el("p", f"The {counted(len(items), 'row')} furthest off."), el("ol", *items, class_="mistakes"))


def written(run: RunFolder) -> Markup | None:
    """What was asked, the right text and the answer, each below the other; of texts alone, the hardest ones.

    Where each row has a loss, the highest comes first.
    """
    options = run.metrics["task"].get("options", {})
    answered = run.rows[: options.get("generate_rows")] if options.get("generate") else []
    rows = answered or run.rows
    losses = {id(row): number_in(row.more.get("loss", "")) for row in rows}
    sorted_ = all(loss is not None for loss in losses.values())
    if sorted_:
        rows = sorted(rows, key=lambda row: -(losses[id(row)] or 0.0))
    elif not answered:
        return None
    count = counted(min(SHOWN, len(rows)), "row")
    which = f"The {count} that the model foresaw least, by the loss of a token" if sorted_ else f"The first {count}"
    if answered and len(answered) < len(run.rows):
        which += f"; answers were written to {len(answered):,} of {len(run.rows):,} rows"
    items = []
    for row in rows[:SHOWN]:
        loss = losses[id(row)]
        marks = [f"loss {loss:.3f}"] if loss is not None else []
        sides = _sides(row, answered=bool(answered))
        items.append(el("li", sides, el("p", " · ".join([*marks, f"line {row.line}"]), class_="verdict")))
    return el("div", el("p", f"{which}."), el("ol", *items, class_="mistakes"))


def _sides(row: Row, *, answered: bool) -> Markup:
    asked, right = _conversation(row)
    parts: list[tuple[str, Node]] = []
    if asked:
        parts.append(("asked" if right else "text", text_of_user(asked)))
    if right:
        parts.append(("right", text_of_user(right)))
    if answered:
        said = text_of_user(row.answer) if row.answer else el("p", "nothing was written", class_="text note")
        parts.append(("answer", said))
    return el("dl", *(node for name, said in parts for node in (el("dt", name), el("dd", said))), class_="sides")


def _conversation(row: Row) -> tuple[str, str]:
    """What was asked and the right answer; messages are read one below the other."""
    label = row.given.get("label", "")
    asked = [cell for role, cell in row.given.items() if role != "label" and cell]
    messages = _messages(asked[0]) if len(asked) == 1 else None
    if messages is None:
        return "\n".join(asked), label
    last = messages.pop()[1] if messages and messages[-1][0] in ("assistant", "gpt", "bot", "model") and not label else label
    return "\n".join(f"{who}: {what}" for who, what in messages), last


def conversation_in(cell: str) -> str:
    """The messages of a cell that holds some, one below the other; else what it holds."""
    messages = _messages(cell)
    return cell if messages is None else "\n".join(f"{who}: {what}" for who, what in messages)


def _messages(cell: str) -> list[tuple[str, str]] | None:
    if not cell.startswith("["):
        return None
    try:
        return [(str(m.get("role") or m.get("from")), str(m.get("content") or m.get("value"))) for m in json.loads(cell)]
    except (ValueError, AttributeError):
        return None
