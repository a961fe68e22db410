"""Pairs and judgements that a model gets wrong, and what it writes before and after."""

from __future__ import annotations

from collections.abc import Sequence

from afina.report.beside import conversation_in
from afina.report.cells import number_in
from afina.report.folder import Row, RunFolder
from afina.report.markup import Markup, Node, el, text_of_user
from afina.report.words import counted

__all__ = ["POLICIES", "before_and_after", "misjudged", "misranked"]

POLICIES = ("dpo", "grpo", "kto", "orpo")
SHOWN = 20


def misranked(run: RunFolder) -> Markup | None:
    """Pairs whose worse answer is scored highest above the better one."""
    there = [(value, row) for row in run.rows if (value := number_in(row.more.get("margin", ""))) is not None]
    if not there:
        return None
    there.sort(key=lambda made: made[0])
    wrong = sum(value <= 0 for value, _ in there)
    items = []
    for value, row in there[:SHOWN]:
        sides = _sides([("prompt", row.given.get("text", "")), ("better", row.given.get("text_pair", "")),
                        ("worse", row.given.get("label", ""))])  # fmt: skip
        said = el("p", "margin ", el("b", f"{value:.3f}"), f" · line {row.line}", class_="verdict")
        items.append(el("li", sides, said))
    head = f"{counted(wrong, 'pair')} of {len(there):,} are ranked the wrong way round or equal. "
    return el("div", el("p", f"{head}The {counted(len(items), 'pair')} with the lowest margin:"),
              el("ol", *items, class_="mistakes"))  # fmt: skip


def misjudged(run: RunFolder) -> Markup | None:
    """Good answers that have become rarer, and bad ones that have become likelier."""
    there = [(value, row) for row in run.rows if (value := number_in(row.more.get("margin", ""))) is not None]
    if not there:
        return None
    there.sort(key=lambda made: made[0])
    items = []
    for value, row in there[:SHOWN]:
        good = row.more.get("judged") == "desirable"
        sides = _sides([("prompt", row.given.get("text", "")), ("good" if good else "bad", row.given.get("text_pair", ""))])
        became = f"became {'rarer' if (value < 0) == good else 'likelier'}: reward "
        said = el("p", became, el("b", row.more.get("reward", "")), f" · line {row.line}", class_="verdict")
        items.append(el("li", sides, said))
    wrong = sum(value <= 0 for value, _ in there)
    head = f"{counted(wrong, 'answer')} of {len(there):,} moved the wrong way or not at all. "
    return el("div", el("p", f"{head}The {counted(len(items), 'answer')} that moved furthest that way, or least:"),
              el("ol", *items, class_="mistakes"))  # fmt: skip


def before_and_after(run: RunFolder) -> Markup | None:
    """What the model wrote before it was tuned, and what it writes now, with its rewards where there are some."""
    rows = [row for row in run.rows if row.more.get("before") or row.answer]
    if not any(row.more.get("before") for row in rows):
        return None
    rewarded = [(_number(row, "reward"), _number(row, "reward before")) for row in rows]
    with_reward = all(a is not None and b is not None for a, b in rewarded)
    head = f"The first {counted(min(SHOWN, len(rows)), 'row')} of {len(rows):,}."
    if with_reward:
        more = sum((a or 0) > (b or 0) for a, b in rewarded)
        less = sum((a or 0) < (b or 0) for a, b in rewarded)
        head = f"The reward is higher than before in {more:,} of {len(rows):,} rows and lower in {less:,}. {head}"
    items = []
    for row, (after, before) in list(zip(rows, rewarded, strict=True))[:SHOWN]:
        wrote = row.more.get("before", "")
        sides = _sides([("prompt", row.given.get("text", "")), ("before", wrote), ("after", row.answer)])
        marks = [f"reward {before:.4g} before, {after:.4g} after"] if before is not None and after is not None else []
        items.append(el("li", sides, el("p", " · ".join([*marks, f"line {row.line}"]), class_="verdict")))
    return el("div", el("p", head), el("ol", *items, class_="mistakes"))


def _number(row: Row, column: str) -> float | None:
    return number_in(row.more.get(column, ""))


def _sides(parts: Sequence[tuple[str, str]]) -> Markup:
    """Texts below one another, each with its name."""
    made: list[Node] = []
    for name, text in parts:
        shown = conversation_in(text)
        made += [el("dt", name), el("dd", text_of_user(shown) if shown else el("p", "nothing", class_="text note"))]
    return el("dl", *made, class_="sides")
