"""`report.html` of a sweep: the best point, all points in order, and how they learned; one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from afina.core.files import write_atomically
from afina.report.charts import Line, chart
from afina.report.folder import Shown
from afina.report.html import REPORT
from afina.report.markup import Markup, cut, el, table
from afina.report.style import CSS
from afina.report.words import counted, duration
from afina.sweep.points import Found, best_of

__all__ = ["write_page"]

_STYLES = ("a", "b", "c", "d")  # of the first points; the others are faint
_DRAWN = 40  # learning curves


def write_page(sweep: Path, found: Sequence[Found]) -> Path:
    """Write the page of the finished points; there is one at least."""
    path = sweep / REPORT
    text = _page(sweep, found)
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return path


def _page(sweep: Path, found: Sequence[Found]) -> str:
    finished = sorted((one for one in found if one.state == "finished"), key=lambda one: one.score, reverse=True)
    best = best_of(found)
    assert best is not None
    shown = Shown(best.title, best.form, best.better)
    name = cut(sweep.resolve().name, 80)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("title", f"{name}: report of a sweep of afina"),
        el("style", Markup(CSS)),
        el("link", rel="icon", href="data:,"),
    )
    rest = len(found) - len(finished)
    seeds = len({one.seed for one in finished})
    answer = el(
        "div",
        el("p", shown.said(best.validation.get(best.best_by)), class_="score"),
        el("p", f"{best.title} of the validation rows: point {best.point.number}, {best.point}"),
        el("p", f"of the test rows {shown.said(best.test.get(best.best_by))}"),
        el("p", "The validation rows chose this point, the test rows chose nothing. Of many points the best looks better on "
           "the rows that chose it than it is, so the figure of the test rows is the one to believe.", class_="note"),
        el("p", f"{counted(rest, 'point')} of {len(found)} not finished.", class_="note") if rest else None,
        el("p", "The seed divides the rows too: points of different seeds were scored on different rows.", class_="note")
        if seeds > 1 else None,
        class_="answer",
    )  # fmt: skip
    body = el(
        "body",
        el("header", el("h1", name, dir="auto"), el("p", f"{counted(len(found), 'point')} of a sweep", class_="soft")),
        el("main", answer, el("section", el("h2", "Every point"), _table(found, finished, shown), id="points"),
           el("section", el("h2", "How they compare and learned"),
              el("div", _ranks(finished, shown), _curves(finished, shown), class_="charts"), id="curves")),
    )  # fmt: skip
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def _table(found: Sequence[Found], finished: Sequence[Found], shown: Shown) -> Markup:
    keys = list(dict.fromkeys(key for one in found for key in one.point.values))
    columns = ["point", *keys, f"{shown.title}, validation", "loss", f"{shown.title}, test", "kept epoch", "training"]
    rows = []
    for one in finished:
        link = el("a", one.folder.name, href=f"{one.folder.name}/{REPORT}")
        rows.append([
            link, *(one.point.values.get(key, "") for key in keys), shown.said(one.validation.get(one.best_by)),
            f"{one.validation['loss']:.4f}", shown.said(one.test.get(one.best_by)), one.train["best_epoch"],
            duration(one.train["seconds"]),
        ])  # fmt: skip
    for one in found:
        if one.state != "finished":
            said = f"{one.state}: {cut(one.error, 200)}" if one.error else one.state
            rows.append([one.folder.name, *(one.point.values.get(key, "") for key in keys), said, "", "", "", ""])
    return table("The best first, by the validation rows", columns, rows, numbers=range(len(keys) + 1, len(columns)))


def _ranks(finished: Sequence[Found], shown: Shown) -> Markup:
    def line(name: str, side: str, style: str) -> Line:
        values = [getattr(one, side).get(one.best_by) for one in finished]
        return Line(name, [(i, value) for i, value in enumerate(values, 1) if value is not None], style, marks=True)

    return chart(
        f"{shown.title} of validation and test rows", [line("validation", "validation", "a"), line("test", "test", "b")],
        described="the points in order of the validation rows' figure", x_name="points, the best first",
        show=shown.said,
    )  # fmt: skip


def _curves(finished: Sequence[Found], shown: Shown) -> Markup:
    lines = []
    for i, one in enumerate(finished[:_DRAWN]):
        read = [json.loads(text) for text in (one.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        key = f"validation_{one.best_by}"
        points = [(line["epoch"], line[key]) for line in read if line.get(key) is not None]
        style = _STYLES[i] if i < len(_STYLES) else "faint"
        lines.append(Line(f"{one.point.number}: {cut(str(one.point), 40)}", points, style, marks=i < len(_STYLES)))
    return chart(
        f"{shown.title} of the validation rows while training", lines, described="a line a point", x_name="epoch",
        show=shown.said,
    )  # fmt: skip
