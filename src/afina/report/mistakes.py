"""The worst mistakes with their texts, and which of them may be wrong labels rather than wrong answers.

A label is suspected, as confident learning does (https://arxiv.org/abs/1911.00068), where the model gives another class at
least the probability that it gives that class on average where it is the label.
"""

from __future__ import annotations

import numpy as np

from afina.report.folder import Answers, RunFolder
from afina.report.markup import Markup, cut, el, text_of_user
from afina.report.words import counted, percent

__all__ = ["mistakes", "suspected", "worst"]

SHOWN = 20
_SURE = 0.8  # below this no label is suspected, however unsure the model is elsewhere


def worst(answers: Answers) -> list[int]:
    """Wrong rows, the most confident first."""
    wrong = np.flatnonzero(~answers.right)
    sure = answers.probabilities[wrong, answers.answer[wrong]]
    return [int(i) for i in wrong[np.argsort(-sure, kind="stable")]]


def suspected(answers: Answers) -> set[int]:
    """Wrong rows whose label may be the mistake."""
    found = set()
    for i in worst(answers):
        said = int(answers.answer[i])
        own = answers.probabilities[answers.truth == said, said]
        usual = float(own.mean()) if len(own) else 1.0
        if answers.probabilities[i, said] >= max(usual, _SURE):
            found.add(i)
    return found


def mistakes(run: RunFolder) -> Markup:
    """The list."""
    answers, labels = run.answers, run.labels
    order, doubtful = worst(answers), suspected(answers)
    if not order:
        return el("p", f"None: all {counted(len(answers.lines), 'test row')} are answered right.")
    items = []
    for i in order[:SHOWN]:
        said, truth = answers.answer[i], answers.truth[i]
        tag = [" · ", el("span", "label error?", class_="tag")] if i in doubtful else []
        items.append(
            el(
                "li",
                text_of_user(answers.texts[i]),
                el("p", "answered ", el("b", cut(labels[said]), dir="auto"), f" {percent(answers.probabilities[i, said])}, label ",
                   el("b", cut(labels[truth]), dir="auto"), f" {percent(answers.probabilities[i, truth])} · line {answers.lines[i]}",
                   *tag, class_="verdict"),
                class_="suspect" if i in doubtful else None,
            )
        )  # fmt: skip
    count = counted(len(order), "wrong answer")
    shown = f"The {SHOWN} of {count} that the model was surest of" if len(order) > SHOWN else count.capitalize()
    sure = " The surest comes first." if len(order) > 1 else ""
    hint = (
        f" {counted(len(doubtful), 'row')} marked “label error?”: there the model is as sure of another class as it usually is "
        "where that class is the label. Read them: correct the file if the label is wrong, and learn from the row if it is right."
        if doubtful
        else ""
    )
    return el("div", el("p", f"{shown}, with the line of the data file.{sure}{hint}"), el("ol", *items, class_="mistakes"))
