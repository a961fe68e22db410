"""Queries whose right passage was found late, with the passage that was found instead."""

from __future__ import annotations

from afina.report.cells import number_in
from afina.report.folder import Row, RunFolder
from afina.report.markup import Markup, Node, el, text_of_user
from afina.report.words import counted, percent

__all__ = ["misses"]

SHOWN = 20


def misses(run: RunFolder) -> Markup | None:
    """The worst ones: the right passages with the most wrong ones before them."""
    ranked = [(rank, row) for row in run.rows if (rank := number_in(row.more.get("rank", ""))) is not None]
    if not ranked:
        return None
    late = sorted(((rank, row) for rank, row in ranked if rank > 1), key=lambda made: -made[0])
    if not late:
        return el("p", f"None: all {counted(len(ranked), 'right passage')} came before every wrong one.")
    items = [el("li", _sides(row), el("p", f"found at place {rank:g} · line {row.line}", class_="verdict"))
             for rank, row in late[:SHOWN]]  # fmt: skip
    said = (
        f"{len(late):,} of {counted(len(ranked), 'right passage')} ({percent(len(late) / len(ranked))}) "
        f"{'has' if len(late) == 1 else 'have'} a wrong one before {'it' if len(late) == 1 else 'them'}. "
        f"The {counted(len(items), 'worst miss', 'worst misses')}: a passage found instead may well be right too, and "
        "only not be marked so in the file."
    )
    return el("div", el("p", said), el("ol", *items, class_="mistakes"))


def _sides(row: Row) -> Markup:
    parts: list[tuple[str, Node]] = [
        ("query", text_of_user(row.given.get("text", ""))), ("right", text_of_user(row.given.get("text_pair", ""))),
        ("found first", text_of_user(row.more.get("found", ""))),
    ]  # fmt: skip
    return el("dl", *(node for name, said in parts for node in (el("dt", name), el("dd", said))), class_="sides")
