"""`report.html`: one file that needs no network, made from a run folder alone, so that it can be made again at any time.

In the order in which a reader asks: how good is it, what is it, how did it go, where does it fail, what was in the data,
what did it cost, how is it used. No script; figures are inline SVG.
"""

from __future__ import annotations

from pathlib import Path

from afina.core.files import write_atomically
from afina.report.answer import answer
from afina.report.folder import RunFolder, read_run
from afina.report.markup import Markup, cut, el
from afina.report.sections import sections
from afina.report.style import CSS

__all__ = ["REPORT", "render", "write_report"]

REPORT = "report.html"
_FOR = {
    "causal_lm": "to continue texts",
    "dreambooth": "to draw one subject",
    "question_answering": "to find answers in texts",
    "regression": "to give texts a number",
    "reranking": "to put passages in order for a query",
    "sentence_similarity": "to tell how alike texts are",
    "reward": "to rank answers",
    "dpo": "to answer as people prefer",
    "orpo": "to answer as people prefer",
    "kto": "to answer as people prefer",
    "grpo": "to write what is rewarded",
    "semantic_segmentation": "to give every pixel a class",
    "speech_recognition": "to write down what is said",
    "seq2seq": "to turn texts into texts",
}


def render(run: RunFolder) -> str:
    """The whole page."""
    name = cut(run.path.resolve().name, 80)
    recipe = run.recipe
    about = f"{cut(recipe['model'])} tuned with {cut(recipe['method']['name'])} {_purpose(run)}"
    parts = sections(run)
    # Nothing may be loaded, from anywhere, whatever a text holds.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("title", f"{name}: report of a run of afina"),
        el("style", Markup(CSS)),
        el("link", rel="icon", href="data:,"),
    )
    links = (Markup(el("a", part.title, href=f"#{part.key}") + " ") for part in parts)
    body = el(
        "body",
        el("header", el("h1", name, dir="auto"), el("p", about, class_="soft")),
        el("main", answer(run), el("nav", *links, aria_label="Sections"),
           *(el("section", el("h2", part.title), part.body, id=part.key) for part in parts)),
    )  # fmt: skip
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def _purpose(run: RunFolder) -> str:
    """What the model is for."""
    count = len(run.labels)
    known = {
        "multi_label_classification": f"to say which of {count} labels a text has",
        **dict.fromkeys(
            ("audio_classification", "image_classification", "sequence_classification"), f"to tell {count} classes apart"
        ),
        "token_classification": f"to tag words with {count} tags",
        "document_token_classification": f"to tag the words of pages with {count} tags",
    }
    return known.get(run.task) or _FOR.get(run.task, f"for {run.task.replace('_', ' ')}")


def write_report(run: Path | RunFolder, output: Path | None = None) -> Path:
    """Write the report of a run, into its folder unless told otherwise; CheckpointError where the folder is broken."""
    run = run if isinstance(run, RunFolder) else read_run(run)
    path = output or run.path / REPORT
    text = render(run)
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return path
