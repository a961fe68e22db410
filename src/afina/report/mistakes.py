"""The worst mistakes of classifiers with their texts, and which of them may be wrong labels rather than wrong answers.

A label is suspected where the model is sure of another class and where, of all its answers of that class that are at least
as sure, 99 % are right. It takes a hundred such answers to say that, so small test sets have no suspects; a cousin of
confident learning (https://arxiv.org/abs/1911.00068) that asks for more evidence.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from afina.report.folder import Row, RunFolder
from afina.report.markup import Markup, Node, cut, el, texts_of_user
from afina.report.pictures import thumbnail
from afina.report.players import player
from afina.report.scores import chosen_labels, true_labels
from afina.report.words import counted, percent

__all__ = ["mistaken_classes", "mistaken_labels", "suspected", "worst"]

SHOWN = 20
_SURE, _RIGHT = 0.8, 0.99


def worst(truth: np.ndarray, answer: np.ndarray, probabilities: np.ndarray) -> list[int]:
    """Wrong rows, the most confident first; `truth` and `answer` are class numbers `[rows]`, `probabilities` theirs."""
    wrong = np.flatnonzero(truth != answer)
    sure = probabilities[wrong, answer[wrong]]
    return [int(i) for i in wrong[np.argsort(-sure, kind="stable")]]


def suspected(truth: np.ndarray, answer: np.ndarray, probabilities: np.ndarray) -> set[int]:
    """Wrong rows whose label may be the mistake."""
    found, right = set(), truth == answer
    for i in worst(truth, answer, probabilities):
        said = int(answer[i])
        sure = probabilities[i, said]
        alike = (answer == said) & (probabilities[:, said] >= sure)
        if sure >= _SURE and right[alike].mean() >= _RIGHT:
            found.add(i)
    return found


def mistaken_classes(run: RunFolder) -> Markup:
    """Wrong answers, the surest first."""
    truth = run.numbers_of([row.given["label"] for row in run.rows])
    answer = run.numbers_of([row.answer for row in run.rows])
    read = (truth, answer, run.probabilities)
    order, doubtful = worst(*read), suspected(*read)
    if not order:
        return el("p", f"None: all {counted(len(run.rows), 'test row')} are answered right.")
    items = []
    for i in order[:SHOWN]:
        row, share = run.rows[i], run.probabilities[i]
        tag = [" · ", el("span", "label error?", class_="tag")] if i in doubtful else []
        items.append(
            el(
                "li",
                _seen(row.given),
                el("p", "answered ", el("b", cut(row.answer), dir="auto"), f" {percent(share[answer[i]])}, label ",
                   el("b", cut(row.given["label"]), dir="auto"), f" {percent(share[truth[i]])}", _place(row),
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
    seen = "mistakes seen" if {"image", "audio"} & run.rows[0].given.keys() else "mistakes"
    return el("div", el("p", f"{shown}, with the line of the data file.{sure}{hint}"), el("ol", *items, class_=seen))


def _seen(given: Mapping[str, str]) -> Markup:
    """What a row gives, to be looked at, listened to or read."""
    if "image" in given:
        return thumbnail(given["image"])
    return player(given["audio"]) if "audio" in given else texts_of_user(given)


def _place(row: Row) -> str:
    """Where it stands; nothing where that is the file itself, which is named already."""
    return "" if "/" in str(row.line) and {"image", "audio"} & row.given.keys() else f" · line {row.line}"


def mistaken_labels(run: RunFolder) -> Markup:
    """Rows with labels that are missing or too many, the surest mistakes first."""
    truth, chosen, p = true_labels(run), chosen_labels(run), run.probabilities
    wrong = truth != chosen
    order = [i for i in np.argsort(-(wrong * np.abs(truth - p)).max(axis=1), kind="stable") if wrong[i].any()]
    if not order:
        return el("p", f"None: all labels of all {counted(len(run.rows), 'test row')} are right.")
    items = []
    for i in order[:SHOWN]:
        row = run.rows[i]
        said: list[Node] = []
        for name, mask, class_ in (("right", truth & chosen, "hit"), ("missed", truth & ~chosen, "missed"),
                                   ("too many", chosen & ~truth, "extra")):  # fmt: skip
            places = np.flatnonzero(mask[i])
            if len(places):
                said.append(f"{' · ' if said else ''}{name}: ")
                for n, k in enumerate(places):
                    mark = el("mark", cut(run.labels[k], 40), class_=class_, dir="auto")
                    said += [", " if n else "", mark, f" {percent(p[i, k])}"]
        items.append(el("li", texts_of_user(row.given), el("p", *said, f" · line {row.line}", class_="verdict")))
    count = counted(len(order), "row")
    shown = f"{SHOWN} of {count}" if len(order) > SHOWN else count.capitalize()
    return el(
        "div",
        el("p", f"{shown} with a label that is missing or too many, and the probability it was given. The surest mistakes "
           "come first."),
        el("ol", *items, class_="mistakes"),
    )  # fmt: skip
