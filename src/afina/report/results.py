"""The answer first, and what is behind it: baselines, confusions, figures of each class, calibration."""

from __future__ import annotations

from afina.report.charts import reliability
from afina.report.folder import RunFolder
from afina.report.markup import Markup, cut, el, table
from afina.report.statistics import calibration, calibration_error, macro_f1_interval, wilson
from afina.report.words import counted, interval, percent

__all__ = ["answer", "calibrated", "classes", "confusions"]

MATRIX = 20  # classes beyond which a matrix cannot be read
_MOST = 200  # classes in a table
_BASELINES = {"word_counts": "words counted (naive Bayes)", "majority": "always the commonest class"}


def answer(run: RunFolder) -> Markup:
    """The test score beside what needs no model, and how far it can be trusted."""
    test, right = run.metrics["test"], run.answers.right
    rows, hits = len(right), int(right.sum())
    low, high = wilson(hits, rows)
    f1 = macro_f1_interval(test["confusion"])
    bases = {n: run.metrics["baselines"][k] for k, n in _BASELINES.items() if k in run.metrics["baselines"]}
    bars = [_bar("this model", hits / rows, (low, high))]
    bars += [_bar(name, figures["accuracy"], None) for name, figures in bases.items()]
    best = max(bases, key=lambda name: bases[name]["accuracy"], default=None)
    verdict = "No baseline was stored to compare with."
    if best is not None:
        score = bases[best]["accuracy"]
        wrong = rows - round(score * rows)
        other = f"“{best}” is right in {percent(score)} of the rows ({wrong:,} wrong)"
        if low > score:
            verdict = f"That is better than what needs no model: {other}."
        elif hits / rows > score:
            verdict = f"That may be chance: {other}, which lies within the interval. More test rows would tell."
        else:
            verdict = f"That is no better than what needs no model: {other}. Do not use this model as it is."
    return el(
        "section",
        el("p", el("span", percent(hits / rows), class_="score"), " of the test rows are answered right"),
        el("p", el("b", f"{rows - hits:,} of {rows:,} wrong."), f" {verdict}"),
        el("div", *bars, class_="bars", role="img", aria_label="Accuracy of this model and of the baselines"),
        el("p", f"With 95 % confidence the accuracy on more rows like these lies between {interval(low, high)}; macro F1 "
           f"is {test['macro_f1']:.3f} ({f1[0]:.3f} to {f1[1]:.3f}). The test rows were read once, after training.",
           class_="note"),
        class_="answer", aria_label="The answer",
    )  # fmt: skip


def _bar(name: str, share: float, between: tuple[float, float] | None) -> Markup:
    drawn = [
        el("rect", x=0, y=0, width=100, height=10, class_="track"),
        el("rect", x=0, y=0, width=round(100 * share, 2), height=10, class_="bar own" if between else "bar"),
    ]
    if between:
        low, high = (round(100 * end, 2) for end in between)
        drawn.append(el("line", x1=low, x2=high, y1=5, y2=5, class_="range"))
        drawn += [el("line", x1=end, x2=end, y1=2, y2=8, class_="range") for end in (low, high)]
    svg = el("svg", *drawn, viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true")
    return el("div", el("span", name), svg, el("span", percent(share), class_="n"))


def confusions(run: RunFolder) -> Markup:
    """The matrix, or the worst confusions of many classes."""
    labels, matrix = run.labels, run.metrics["test"]["confusion"]
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


def classes(run: RunFolder) -> Markup:
    """Precision, recall and F1 of each class, the worst first where they are many."""
    figures = list(run.metrics["test"]["per_class"].items())
    if len(figures) > MATRIX:
        figures.sort(key=lambda item: item[1]["f1"])
    rows = [
        [cut(label), percent(m["precision"]), percent(m["recall"]), f"{m['f1']:.3f}", f"{m['rows']:,}"]
        for label, m in figures[:_MOST]
    ]
    order = ", the worst first" if len(figures) > MATRIX else ""
    made = table(f"Figures of each class on the test rows{order}", ["class", "precision", "recall", "F1", "rows"], rows,
                 numbers=[1, 2, 3, 4])  # fmt: skip
    if len(figures) > MATRIX:
        head = table(
            "The ten worst classes", ["class", "precision", "recall", "F1", "rows"], rows[:10], numbers=[1, 2, 3, 4]
        )
        left = f" ({len(figures) - _MOST} better ones are in metrics.json)" if len(figures) > _MOST else ""
        made = el("div", head, el("details", el("summary", f"All {len(figures)} classes{left}"), made))
    explained = "Precision: of the rows answered so, the share that is so. Recall: of the rows that are so, the share found."
    return el("div", made, el("p", explained, class_="note"))


def calibrated(run: RunFolder) -> Markup:
    """Whether the probabilities mean what they say."""
    answers = run.answers
    confidence = answers.probabilities.max(axis=1)
    bins = calibration(confidence, answers.right)
    error, mean, share = calibration_error(bins), float(confidence.mean()), float(answers.right.mean())
    gap = mean - share
    if abs(gap) < 0.02:
        said = "On the whole its probabilities can be taken as they are."
    elif gap > 0:
        said = "It is surer than it should be: do not take its probabilities as they are."
    else:
        said = "It is less sure than it could be."
    described = f"{counted(len(bins), 'group')} of answers; on average promised {percent(mean)}, right {percent(share)}"
    rows = [[f"{b.low:.0%} to {b.high:.0%}", f"{b.rows:,}", percent(b.confidence), percent(b.hits / b.rows)] for b in bins]
    return el(
        "div",
        el("p", f"The model gave its answers a probability of {percent(mean)} on average and was right in {percent(share)}. "
           f"{said} Expected calibration error: {percent(error)}."),
        el("div", reliability(bins, described),
           table("Answers by the probability they were given", ["probability", "rows", "on average", "right"], rows,
                 numbers=[1, 2, 3]), class_="charts"),
    )  # fmt: skip
