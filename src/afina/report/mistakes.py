"""The worst mistakes with their texts, and which of them may be wrong labels rather than wrong answers.

A label is suspected where the model is sure of another class and where, of all its answers of that class that are at least
as sure, 99 % are right. It takes a hundred such answers to say that, so small test sets have no suspects; a cousin of
confident learning (https://arxiv.org/abs/1911.00068) that asks for more evidence.
"""

from __future__ import annotations

import numpy as np

from afina.report.folder import Answers, RunFolder
from afina.report.markup import Markup, cut, el, text_of_user
from afina.report.words import counted, percent

__all__ = ["mistakes", "suspected", "worst"]

SHOWN = 20
_SURE, _RIGHT = 0.8, 0.99


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
        sure = answers.probabilities[i, said]
        alike = (answers.answer == said) & (answers.probabilities[:, said] >= sure)
        if sure >= _SURE and answers.right[alike].mean() >= _RIGHT:
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
        said, truth, share = answers.answer[i], answers.truth[i], answers.probabilities[i]
        tag = [" · ", el("span", "label error?", class_="tag")] if i in doubtful else []
        items.append(
            el(
                "li",
                text_of_user(answers.texts[i]),
                el("p", "answered ", el("b", cut(labels[said]), dir="auto"), f" {percent(share[said])}, label ",
                   el("b", cut(labels[truth]), dir="auto"), f" {percent(share[truth])} · line {answers.lines[i]}",
                   *tag, class_="verdict"),
                class_="suspect" if i in doubtful else None,
            )
        )  # fmt: skip
    count = counted(len(order), "wrong answer")
    shown = f"The {SHOWN} of {count} that the model was surest of" if len(order) > SHOWN else count.capitalize()
    sure = " The surest comes first." if len(order) > 1 else ""
    hint = (
        f" In {counted(len(doubtful), 'row')}, marked “label error?”, the label may be the mistake: of the answers that are "
        "at least as sure, 99 % are right. Read them, and correct the file where the label is wrong."
        if doubtful
        else ""
    )
    return el("div", el("p", f"{shown}, with the line of the data file.{sure}{hint}"), el("ol", *items, class_="mistakes"))
