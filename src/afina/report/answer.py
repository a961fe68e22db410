"""The answer first: the figure that matters beside what answers without learning, and how far it can be trusted."""

from __future__ import annotations

from typing import Any

from afina.report.cells import TAGGED
from afina.report.folder import RunFolder, Shown
from afina.report.markup import Markup, Node, cut, el, join, table
from afina.report.scores import Intervals, intervals
from afina.report.words import counted, percent

__all__ = ["answer", "figures", "headline"]

# Figures that a task measures beside those it is shown by.
_MORE = {
    "roc_auc": Shown("ROC AUC"), "brier": Shown("Brier score", better=-1),
    "calibration_error": Shown("calibration error", ".1%", -1), "top_3_accuracy": Shown("among the three likeliest", ".1%"),
    "reference_accuracy": Shown("likelier to the reference in the right order", ".1%"), "length": Shown("tokens", ".1f"),
    "hamming_loss": Shown("Hamming loss", ".4f", -1), "mse": Shown("MSE", ".4g", -1), "pearson": Shown("Pearson"),
}  # fmt: skip
_WRONG = {
    **dict.fromkeys(TAGGED, "have a wrong tag"), "multi_label_classification": "have a wrong or missing label",
    "question_answering": "are not answered exactly",
    **dict.fromkeys(("reward", "dpo", "orpo"), "are ranked the wrong way round or equal"),
}  # fmt: skip


def headline(run: RunFolder) -> str:
    """Key of the figure that is said first."""
    if run.classifies:
        return "accuracy"
    written = (key for key in ("wer", "rouge_l") if key in run.figures and run.test.get(key) is not None)
    return next(written, next(iter(run.figures)))  # of texts, what was written


def answer(run: RunFolder) -> Markup:
    """One figure, what it must be compared with, and how far it can be trusted."""
    key, test, known = headline(run), run.test, intervals(run)
    shown, value, rows = run.figures[key], run.test[key], len(run.rows)
    between = known.get(key)
    if run.classifies:
        said: Node = [el("span", percent(value), class_="score"), " of the test rows are answered right"]
        mistakes = f"{round(rows * (1 - value)):,} of {rows:,} wrong."
    else:
        said = [el("span", shown.said(value), class_="score"), f" {shown.title} on {counted(rows, 'test row')}"]
        wrong = int((~run.right).sum()) if run.right is not None else None
        mistakes = f"{wrong:,} of {rows:,} rows {_WRONG.get(run.task, 'are wrong')}." if wrong is not None else ""
    return el(
        "section",
        el("p", *said),
        el("p", el("b", mistakes) if mistakes else None, f" {_verdict(run, key, between)}"),
        *(el("p", el("b", "Found: "), finding, ".") for finding in run.metrics["train"].get("findings") or []),
        _bars(run, key, between),
        el("p", _trust(run, key, known, test), class_="note"),
        class_="answer",
        aria_label="The answer",
    )


def _verdict(run: RunFolder, key: str, between: tuple[float, float] | None) -> str:
    shown, value = run.figures[key], run.test[key]
    bases = {title: made[key] for title, made in run.baselines.items() if made.get(key) is not None}
    if not bases or value is None:
        return "No baseline was stored to compare with."
    best = max(bases, key=lambda title: shown.better * bases[title])
    score = bases[best]
    other = f"“{best}” has {shown.said(score)}"
    if run.classifies:
        other = f"“{best}” is right in {percent(score)} of the rows ({len(run.rows) - round(score * len(run.rows)):,} wrong)"
    if shown.better * value <= shown.better * score:
        return f"That is no better than the best baseline: {other}. Do not use this model as it is."
    worse_end = None if between is None else between[0] if shown.better > 0 else between[1]
    if worse_end is not None and shown.better * worse_end <= shown.better * score:
        return f"That may be chance: of the baselines {other}, which lies within the interval. More test rows would tell."
    return f"That is better than the best baseline: {other}."


def _trust(run: RunFolder, key: str, known: Intervals, test: dict[str, Any]) -> str:
    said = []
    if key in known:
        low, high = (run.figures[key].said(end) for end in known[key])
        what = "the accuracy" if run.classifies else f"the {run.figures[key].title}"
        said.append(f"With 95 % confidence {what} on more rows like these lies between {low} and {high}.")
    if run.classifies:
        ends = f" ({known['macro_f1'][0]:.3f} to {known['macro_f1'][1]:.3f})" if "macro_f1" in known else ""
        said.append(f"Macro F1 is {test['macro_f1']:.3f}{ends}.")
    if run.figures[key].better < 0:
        said.append("Less is better.")
    learned = "No picture is held out: these are those that it learned from."
    said.append(learned if run.task == "dreambooth" else "The test rows were read once, after training.")
    return " ".join(said)


def _bars(run: RunFolder, key: str, between: tuple[float, float] | None) -> Markup | None:
    """The figure of this model and of each baseline, as bars on one scale."""
    shown = run.figures[key]
    values = {"this model": run.test[key], **{title: made.get(key) for title, made in run.baselines.items()}}
    there = {title: value for title, value in values.items() if value is not None}
    if len(there) < 2 or min(there.values()) < 0:
        return None
    scale = 1.0 if max(there.values()) <= 1 and (shown.better > 0) else max([*there.values(), *(between or ())]) or 1.0
    drawn = [
        _bar(title, shown.said(value), value / scale, tuple(end / scale for end in between) if between and not i else None,
             own=not i)
        for i, (title, value) in enumerate(there.items())
    ]  # fmt: skip
    return el("div", *drawn, class_="bars", role="img", aria_label=f"{shown.title} of this model and of the baselines")


def _bar(name: str, said: str, share: float, between: tuple[float, ...] | None, *, own: bool) -> Markup:
    drawn = [
        el("rect", x=0, y=0, width=100, height=10, class_="track"),
        el("rect", x=0, y=0, width=round(100 * min(share, 1.0), 2), height=10, class_="bar own" if own else "bar"),
    ]
    if between:
        low, high = (round(100 * end, 2) for end in between)
        drawn.append(el("line", x1=low, x2=high, y1=5, y2=5, class_="range"))
        drawn += [el("line", x1=end, x2=end, y1=2, y2=8, class_="range") for end in (low, high)]
    svg = el("svg", *drawn, viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true")
    return el("div", el("span", cut(name, 80)), svg, el("span", said, class_="n"))


def figures(run: RunFolder) -> Markup:
    """Every figure with its interval, beside those of the baselines."""
    known = intervals(run)
    every = {**run.figures, **{key: shown for key, shown in _MORE.items() if key in run.test and key not in run.figures}}
    ranges = any(key in known for key in every)
    columns = ["figure", "this model", *(["95 % interval"] if ranges else []), *(cut(t, 60) for t in run.baselines)]
    rows = []
    for key, shown in every.items():
        ends = [f"{shown.said(known[key][0])} to {shown.said(known[key][1])}" if key in known else ""] if ranges else []
        less = el("span", " (less is better)", class_="soft") if shown.better < 0 else None
        others = [shown.said(made.get(key)) for made in run.baselines.values()]
        rows.append([join([shown.title, less]), shown.said(run.test.get(key)), *ends, *others])
    split = []
    for name in ("with_answer", "without_answer"):
        if made := run.test.get(name):
            said = ", ".join(f"{shown.title} {shown.said(made[key])}" for key, shown in run.figures.items() if key in made)
            split.append(f"Of the {made['rows']:,} questions {name.replace('_', ' ')}: {said}.")
    return el(
        "div",
        table("Figures of the test rows", columns, rows, numbers=range(1, len(columns))),
        *(el("p", line, class_="note") for line in split),
    )
