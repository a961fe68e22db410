"""HTML from nested calls: whatever is not markup made here is escaped, so no text of a user can become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["Markup", "Node", "cut", "el", "join", "table", "text_of_user", "texts_of_user"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_LONG = 280  # characters of a text that are shown at once
_FULL = 4000  # and of the whole, folded away: a report stays small whatever the texts


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Node = Any  # Markup as it is, None as nothing, anything else as escaped text


def _escaped(node: Node) -> str:
    if node is None:
        return ""
    return node if isinstance(node, Markup) else html.escape(_CONTROL.sub("\ufffd", str(node)))


def join(nodes: Iterable[Node]) -> Markup:
    """Several nodes in a row."""
    return Markup("".join(map(_escaped, nodes)))


def el(name: str, /, *children: Node, **attributes: Any) -> Markup:
    """An element; `class_` is written `class`, `stroke_width` as `stroke-width`; None leaves an attribute out."""
    said = "".join(f' {k.rstrip("_").replace("_", "-")}="{_escaped(v)}"' for k, v in attributes.items() if v is not None)
    if name in ("meta", "link", "img"):
        return Markup(f"<{name}{said}>")
    return Markup(f"<{name}{said}>{join(children)}</{name}>")


def cut(text: Any, length: int = 60) -> str:
    """At most `length` characters, the last an ellipsis where something was cut."""
    text = str(text)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def text_of_user(text: str) -> Markup:
    """A text in its own direction; a long one is cut and can be unfolded."""
    if len(text) <= _LONG:
        return el("p", text, class_="text", dir="auto")
    whole = text[:_FULL] + (f"… ({len(text) - _FULL:,} more characters)" if len(text) > _FULL else "")
    summary = el("summary", el("span", cut(text, _LONG), dir="auto"), " ", el("span", "whole text", class_="more"))
    return el("details", summary, el("p", whole, class_="text", dir="auto"), class_="long")


def texts_of_user(given: Mapping[str, str]) -> Markup:
    """The texts of a row, each in its own direction; its label is left out."""
    return join(text_of_user(text) for role, text in given.items() if role != "label" and text)


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Node]],
    *,
    numbers: Iterable[int] = (),
    class_: str | None = None,
    hidden: bool = False,
) -> Markup:
    """A table whose first column names its rows; `numbers` are columns set to the right; a hidden caption is still read."""
    right = set(numbers)
    head = (el("th", name, scope="col", dir="auto", class_="n" if i in right else None) for i, name in enumerate(columns))
    body = (
        el(
            "tr",
            el("th", row[0], scope="row", dir="auto"),
            *(el("td", cell, class_="n" if i in right else None) for i, cell in enumerate(row[1:], 1)),
        )
        for row in rows
    )
    made = el(
        "table",
        el("caption", caption, class_="unseen" if hidden else None),
        el("thead", el("tr", *head)),
        el("tbody", *body),
        class_=class_,
    )
    return el("div", made, class_="wide", tabindex="0", role="region", aria_label=caption)
