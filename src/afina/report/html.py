"""`report.html`: one file that needs no network, made from a run folder alone, so that it can be made again at any time.

In the order in which a reader asks: how good is it, what is it, how did it go, where does it fail, what was in the data,
what did it cost, how is it used. No script; figures are inline SVG.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from afina.core.files import write_atomically
from afina.report.findings import findings
from afina.report.folder import RunFolder, read_run
from afina.report.history import cost, curves, trained
from afina.report.markup import Markup, cut, el
from afina.report.mistakes import mistakes
from afina.report.results import answer, calibrated, classes, confusions
from afina.report.style import CSS
from afina.report.usage import usage

__all__ = ["REPORT", "render", "write_report"]

REPORT = "report.html"
_SECTIONS: tuple[tuple[str, str, Callable[[RunFolder], Markup]], ...] = (
    ("model", "What was trained on what", trained),
    ("training", "How training went", curves),
    ("confusions", "What is taken for what", confusions),
    ("classes", "Each class", classes),
    ("calibration", "Are the probabilities right?", calibrated),
    ("mistakes", "The worst mistakes", mistakes),
    ("data", "The data", findings),
    ("cost", "What it cost", cost),
    ("use", "How to use it", usage),
)


def render(run: RunFolder) -> str:
    """The whole page."""
    name = cut(run.path.resolve().name, 80)
    recipe = run.recipe
    about = f"{cut(recipe['model'])} tuned with {cut(recipe['method']['name'])} to tell {len(run.labels)} classes apart"
    # Nothing may be loaded, from anywhere, whatever a text holds.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("title", f"{name}: report of a run of afina"),
        el("style", Markup(CSS)),
        el("link", rel="icon", href="data:,"),
    )
    links = (Markup(el("a", title, href=f"#{key}") + " ") for key, title, _ in _SECTIONS)
    body = el(
        "body",
        el("header", el("h1", name, dir="auto"), el("p", about, class_="soft")),
        el("main", answer(run), el("nav", *links, aria_label="Sections"),
           *(el("section", el("h2", title), make(run), id=key) for key, title, make in _SECTIONS)),
    )  # fmt: skip
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run, into its folder unless told otherwise; CheckpointError where the folder is broken."""
    run = read_run(folder)
    path = output or folder / REPORT
    text = render(run)
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return path
