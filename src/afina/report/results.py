"""What is behind the figures: confusions, each class or type, calibration, numbers beside the right ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from afina.report.cells import number_in
from afina.report.charts import reliability, scatter
from afina.report.folder import RunFolder
from afina.report.markup import Markup, cut, el, table
from afina.report.scores import true_labels
from afina.report.statistics import Bin, calibration, calibration_error
from afina.report.words import counted, percent

__all__ = ["calibrated", "classes", "confusions", "numbers"]

MATRIX = 20  # classes beyond which a matrix cannot be read
_MOST = 200  # classes in a table
_COLUMNS = {"precision": "precision", "recall": "recall", "f1": "F1", "average_precision": "average precision",
            "roc_auc": "ROC AUC", "threshold": "threshold", "rows": "rows", "entities": "entities"}  # fmt: skip


def confusions(run: RunFolder) -> Markup | None:
    """The matrix, or the worst confusions of many classes."""
    if "confusion" not in run.test:
        return None
    labels, matrix = run.labels, run.test["confusion"]
    pairs = sorted(
        ((matrix[i][j], i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j and matrix[i][j]),
        key=lambda pair: (-pair[0], pair[1:]),
    )
    if len(labels) > MATRIX:
        if not pairs:
            return el("p", "No class was taken for another.")
        rows = [
            [cut(labels[i]), el("span", cut(labels[j]), dir="auto"), f"{count:,}", f"{sum(matrix[i]):,}"]
            for count, i, j in pairs[:MATRIX]
        ]
        made = table("Classes that are taken for others, most often first", ["is", "answered", "times", "of rows"], rows,
                     numbers=[2, 3])  # fmt: skip
        left = f"{counted(len(pairs) - MATRIX, 'more pair')} of classes are confused, each at most as often. "
        return el("div", made, el("p", (left if len(pairs) > MATRIX else "") + f"A matrix of {len(labels)} classes would "
                  "not be readable; predictions.csv holds every row.", class_="note"))  # fmt: skip
    rows = [[f"is {cut(label)}", *(_shaded(n, sum(matrix[i]), i == j) for j, n in enumerate(matrix[i]))]
            for i, label in enumerate(labels)]  # fmt: skip
    columns = ["", *(f"answered {cut(x)}" for x in labels)]
    return table("Test rows by their label (down) and by the answer (across)", columns, rows, class_="matrix")


def _shaded(count: int, total: int, right: bool) -> Markup:
    """A number on a colour as strong as its share of the row; the number stays the information."""
    strength = f"--strength: {0.1 + 0.45 * count / total:.2f}" if count else None
    return el("span", f"{count:,}", class_=("good" if right else "bad") if count else None, style=strength)


def classes(run: RunFolder) -> Markup | None:
    """Precision, recall and F1 of each class or type, the worst first where they are many."""
    what = "types" if "per_type" in run.test else "classes"
    figures = list((run.test.get("per_class") or run.test.get("per_type") or {}).items())
    if not figures:
        return None
    if len(figures) > MATRIX:
        figures.sort(key=lambda item: item[1]["f1"])
    keys = [key for key in _COLUMNS if key in figures[0][1]]
    rows = [[cut(label), *(_cell(key, made[key]) for key in keys)] for label, made in figures[:_MOST]]
    columns, right = [what[:-1] if what == "types" else "class", *(_COLUMNS[key] for key in keys)], range(1, len(keys) + 1)
    order = ", the worst first" if len(figures) > MATRIX else ""
    made = table(f"Figures of the {what} on the test rows{order}", columns, rows, numbers=right)
    if len(figures) > MATRIX:
        head = table(f"The ten worst {what}", columns, rows[:10], numbers=right)
        left = f" ({len(figures) - _MOST} better ones are in metrics.json)" if len(figures) > _MOST else ""
        made = el("div", head, el("details", el("summary", f"All {len(figures)} {what}{left}"), made))
    unit = "entities" if what == "types" else "rows"
    explained = f"Precision: of the {unit} answered so, the share that is so. Recall: of those that are so, the share found."
    if "threshold" in keys:
        explained += " A label is answered where its probability reaches its threshold."
    return el("div", made, el("p", explained, class_="note"))


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key in ("rows", "entities"):
        return f"{value:,}"
    return percent(value) if key in ("precision", "recall") else f"{value:.3f}"


def calibrated(run: RunFolder) -> Markup | None:
    """Whether the probabilities mean what they say."""
    if run.classifies:
        assert run.right is not None
        bins = calibration(confidence := run.probabilities.max(axis=1), right := run.right)
        mean, share = float(confidence.mean()), float(right.mean())
        gap = mean - share
        if abs(gap) < 0.02:
            said = "On the whole its probabilities can be taken as they are."
        elif gap > 0:
            said = "It is surer than it should be: do not take its probabilities as they are."
        else:
            said = "It is less sure than it could be."
        said = (
            f"The model gave its answers a probability of {percent(mean)} on average and was right in {percent(share)}. "
            f"{said} Expected calibration error: {percent(calibration_error(bins))}."
        )
        names = ("Share of right answers by probability", "probability the model gave its answer", "right")
    elif run.task == "multi_label_classification":
        p, truth = run.probabilities.ravel(), true_labels(run).ravel()
        bins = calibration(p, truth)
        mean, share = float(p.mean()), float(truth.mean())
        said = (
            f"Over all rows and labels the model gave a probability of {percent(mean)} on average, and {percent(share)} of "
            f"them are so. Expected calibration error: {percent(calibration_error(bins))}."
        )
        names = ("Share of labels that are so by probability", "probability the model gave a label", "are so")
    else:
        return None
    scaled = run.test.get("calibration")
    if scaled:
        before, after = scaled["before"]["calibration_error"], scaled["after"]["calibration_error"]
        said += (
            f" Scores were divided by a temperature of {scaled['temperature']:.2f}, chosen on the validation rows; the "
            f"error is {percent(before)} without it and {percent(after)} with it."
        )
    return el("div", el("p", said), el("div", *_drawn(bins, names, mean, share), class_="charts"))


def _drawn(bins: list[Bin], names: tuple[str, str, str], mean: float, share: float) -> tuple[Markup, Markup]:
    title, axis, column = names
    described = f"{counted(len(bins), 'group')}; on average promised {percent(mean)}, came true {percent(share)}"
    rows = [[f"{b.low:.0%} to {b.high:.0%}", f"{b.rows:,}", percent(b.confidence), percent(b.hits / b.rows)] for b in bins]
    heads = ["probability", "answers", "on average", column]
    return reliability(bins, described, title, axis), table(title, heads, rows, numbers=[1, 2, 3])


def numbers(run: RunFolder) -> Markup | None:
    """Answers beside the right numbers."""
    if run.task not in ("regression", "sentence_similarity"):
        return None
    pairs = [(number_in(row.given.get("label", "")), number_in(row.answer)) for row in run.rows]
    there = np.array([(a, b) for a, b in pairs if a is not None and b is not None])
    if not len(there):
        return None
    errors = there[:, 1] - there[:, 0]
    low, middle, high = np.quantile(errors, [0.05, 0.5, 0.95])
    said = (
        f"In the middle the answer is {abs(middle):.3g} too {'high' if middle > 0 else 'low'}; nine of ten errors lie "
        f"between {low:.3g} and {high:.3g}."
    )
    if (spread := float(np.ptp(there[:, 1]))) < 0.5 * float(np.ptp(there[:, 0])):
        said += f" Answers span {spread:.3g}, the right numbers {np.ptp(there[:, 0]):.3g}: the model stays near the middle."
    drawn = scatter(
        "Each test row", [(float(a), float(b)) for a, b in there], x_name="right number (answer upwards)", y_name="a row",
        described=said,
    )  # fmt: skip
    return el("div", el("p", said), drawn)
