"""What each test row contributes to the figures of its task: for intervals, and to compare two runs row by row.

Most figures are made of sums over rows (hits, answers, squared errors), so the bootstrap draws sums; correlations are
computed anew for each draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from afina.report.cells import TAGGED, answers_in, names_in, number_in, tagged
from afina.report.folder import SHARE_RIGHT, RunFolder
from afina.report.misheard import word_counts
from afina.report.statistics import bootstrapped, macro_f1_interval, middle_95, resampled_sums, wilson
from afina.tasks.entities import Scheme
from afina.tasks.orders import average_precision, pearson, roc_auc, spearman
from afina.tasks.spans import ARTICLES, f1

__all__ = ["Intervals", "chosen_labels", "intervals", "row_scores", "true_labels"]

Intervals = dict[str, tuple[float, float]]
_FEW = 100  # draws of a bootstrap below which it is left out


def intervals(run: RunFolder) -> Intervals:
    """95 % intervals of the figures, by their keys, as far as the test rows tell them: where every draw of a bootstrap gives
    the same, it says nothing of other rows."""
    if run.intervals is None:
        run.intervals = _intervals(run)
    return run.intervals


def _intervals(run: RunFolder) -> Intervals:
    found: Intervals = {key: tuple(run.test[f"{key}_interval"]) for key in run.figures if f"{key}_interval" in run.test}
    if run.right is not None:
        hits = int(run.right.sum())
        share = SHARE_RIGHT.get(run.task)
        if share in run.test:
            found[share] = wilson(hits, len(run.rows))
    if run.classifies:
        found["macro_f1"] = macro_f1_interval(run.test["confusion"])
        own = run.numbers_of([row.given["label"] for row in run.rows])[:, None] == np.arange(len(run.labels))
        columns = [1] if len(run.labels) == 2 else list(range(len(run.labels)))
        found |= _of_ranks("roc_auc", roc_auc, own[:, columns], run.probabilities[:, columns])
    elif run.task == "multi_label_classification":
        truth = true_labels(run)
        found |= _of_labels(truth, chosen_labels(run))
        found |= _of_ranks("mean_average_precision", average_precision, truth, run.probabilities)
        found |= _of_ranks("roc_auc", roc_auc, truth, run.probabilities)
    elif run.task in TAGGED:
        found |= _of_entities(run)
    elif run.task == "question_answering":
        found["f1"] = middle_95(resampled_sums(row_scores(run)[1][:, None])[:, 0] / len(run.rows))
    elif run.task == "kto":
        good = np.array([row.more.get("judged") == "desirable" for row in run.rows])
        rewards = np.array([number_in(row.more.get("reward", "")) or 0.0 for row in run.rows])
        found |= _of_ranks("auc", roc_auc, good[:, None], rewards[:, None])
    elif run.task == "speech_recognition" and (counts := [pair for row in run.rows if (pair := word_counts(row))]):
        wrong, words = resampled_sums(np.array(counts, dtype=float)).T
        found["wer"] = middle_95(wrong / words)
    elif run.task == "regression" or (run.task == "sentence_similarity" and "spearman" in run.figures):
        found |= _of_numbers(run)
    return {key: ends for key, ends in found.items() if run.test.get(key) is not None and ends[0] < ends[1]}


def row_scores(run: RunFolder) -> tuple[str, np.ndarray]:
    """What is compared row by row, and its value `[rows]`, more being better; empty where nothing can be."""
    if run.task == "question_answering":
        language = str(run.test.get("language", "en"))
        known = language if language in ARTICLES else "en"
        said = ["" if row.more.get("start") == "" else row.answer for row in run.rows]
        return "F1 of a row", np.array([
            f1(answer, [text for text, _ in answers_in(row.given.get("label", ""))], known)
            for row, answer in zip(run.rows, said, strict=True)
        ])  # fmt: skip
    if run.right is not None:
        return "right rows", run.right.astype(float)
    for column, what in (("reward", "reward"), ("margin", "margin")):
        if run.task == {"reward": "grpo", "margin": "kto"}[column]:
            return what, np.array([number_in(row.more.get(column, "")) or 0.0 for row in run.rows])
    ranks = [number_in(row.more.get("rank", "")) for row in run.rows]
    if any(ranks):
        return "inverse rank of a right passage", np.array([1 / rank if rank else 0.0 for rank in ranks])
    pairs = _numbers(run)
    if pairs is not None:
        return "absolute error", -np.abs(pairs[0] - pairs[1])
    shares = [number_in(row.more.get("mean_iou", "")) for row in run.rows]
    if shares and None not in shares:
        return "mean IoU of a row", np.array(shares, dtype=float)
    heard = [word_counts(row) for row in run.rows] if run.task == "speech_recognition" else []
    if heard and None not in heard:
        return "share of wrong words of a row", -np.array([wrong / words for wrong, words in filter(None, heard)])
    losses = [number_in(row.more.get("loss", "")) for row in run.rows]
    if losses and None not in losses:
        return "loss of a row", -np.array(losses, dtype=float)
    return "", np.zeros(0)


def true_labels(run: RunFolder) -> np.ndarray:
    """`[rows, labels]`."""
    return _marked(run, [row.given.get("label", "") for row in run.rows])


def chosen_labels(run: RunFolder) -> np.ndarray:
    """`[rows, labels]`."""
    return _marked(run, [row.answer for row in run.rows])


def _marked(run: RunFolder, cells: list[str]) -> np.ndarray:
    place = {label: i for i, label in enumerate(run.labels)}
    marks = np.zeros((len(cells), len(place)), dtype=bool)
    for i, cell in enumerate(cells):
        marks[i, [place[name] for name in names_in(cell) if name in place]] = True
    return marks


def _of_labels(truth: np.ndarray, answers: np.ndarray) -> Intervals:
    count = truth.shape[1]
    sums = resampled_sums(np.concatenate([truth & answers, truth.astype(int) + answers], axis=1).astype(float), 400)
    hits, either = sums[:, :count], sums[:, count:]
    f1_ = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)
    there = np.maximum((either > 0).sum(axis=1), 1)
    return {
        "micro_f1": middle_95(2 * hits.sum(axis=1) / np.maximum(either.sum(axis=1), 1)),
        "macro_f1": middle_95(f1_.sum(axis=1) / there),
    }


def _of_ranks(
    key: str, curve: Callable[[np.ndarray, np.ndarray], float | None], truth: np.ndarray, probabilities: np.ndarray
) -> Intervals:
    """Of a mean over columns, each of which is sorted anew for every draw; none where that would take long."""
    draws = min(300, 20_000_000 // max(1, truth.size))
    if draws < _FEW:
        return {}

    def figure(rows: np.ndarray) -> float | None:
        found = [curve(probabilities[rows, i], truth[rows, i]) for i in range(truth.shape[1])]
        there = [value for value in found if value is not None]
        return sum(there) / len(there) if there else None

    values = bootstrapped(figure, len(truth), draws)
    return {key: middle_95(values)} if len(values) else {}


def _of_entities(run: RunFolder) -> Intervals:
    scheme, counts = Scheme(str(run.test.get("scheme", "plain"))), []
    for row in run.rows:
        said = tagged(run, row)
        true, given = set(scheme.entities(said.true)), set(scheme.entities(said.answered))
        same = sum(a == b for a, b in zip(said.true, said.answered, strict=True))
        counts.append([len(true & given), len(given), len(true), same, len(said.words)])
    right, answered, present, same, words = resampled_sums(np.array(counts, dtype=float)).T
    ratio = lambda a, b: np.divide(a, b, out=np.zeros_like(a), where=b > 0)
    return {
        "f1": middle_95(ratio(2 * right, answered + present)),
        "precision": middle_95(ratio(right, answered)),
        "recall": middle_95(ratio(right, present)),
        "accuracy": middle_95(ratio(same, words)),
    }


def _numbers(run: RunFolder) -> tuple[np.ndarray, np.ndarray] | None:
    """Answers and targets `[rows]`; None where a row has no number."""
    answers, targets = ([number_in(x) for x in cells] for cells in (
        [row.answer for row in run.rows], [row.given.get("label", "") for row in run.rows]
    ))  # fmt: skip
    if not run.rows or None in answers or None in targets:
        return None
    return np.array(answers, dtype=float), np.array(targets, dtype=float)


def _of_numbers(run: RunFolder) -> Intervals:
    pairs = _numbers(run)
    if pairs is None:
        return {}
    answers, targets = pairs
    errors, rows = answers - targets, len(answers)
    sums = resampled_sums(np.stack([errors**2, np.abs(errors), targets, targets**2], axis=1)) / rows
    spread = sums[:, 3] - sums[:, 2] ** 2
    found: dict[str, Any] = {"mse": sums[:, 0], "rmse": sums[:, 0] ** 0.5, "mae": sums[:, 1]}
    if (spread > 0).all():
        found["r2"] = 1 - sums[:, 0] / spread
    for key, correlation in (("spearman", spearman), ("pearson", pearson)):
        found[key] = bootstrapped(lambda i, f=correlation: f(answers[i], targets[i]), rows)  # type: ignore[misc]
    return {key: middle_95(values) for key, values in found.items() if len(values)}
