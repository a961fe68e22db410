"""Runs side by side. Scores are compared only where they were measured on the same test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from afina.errors import CheckpointError, Problems
from afina.report.folder import RunFolder, read_run
from afina.report.statistics import macro_f1_interval, mcnemar, wilson

__all__ = ["compare_runs", "flat"]

_ABSENT = "-"


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Figures of each run, the options in which the recipes differ, and every pair on the same rows.

    `{"runs": [...], "differing": {option: [value of each run]}, "pairs": [...]}`. A pair holds `same_test_rows`, the number
    of `shared_rows` and, where the test rows are the same, how many rows `only_first` and `only_second` have right and the
    two-sided p of McNemar's exact test. Raises CheckpointError with all that is wrong in all folders.
    """
    problems = Problems("afina compare")
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except CheckpointError as error:
            problems.add(str(error))
    problems.raise_as(CheckpointError)
    recipes = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in ("model", "method.name"))
    differing = {k: [recipe.get(k, _ABSENT) for recipe in recipes] for k in keys}
    return {
        "runs": [_figures(run) for run in runs],
        "differing": {k: v for k, v in differing.items() if any(one != v[0] for one in v)},
        "pairs": [_pair(a, b) for a, b in combinations(runs, 2)],
    }


def flat(recipe: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested options by their whole names, such as `training.epochs`."""
    made: dict[str, Any] = {}
    for key, value in recipe.items():
        made.update(flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value})
    return made


def _figures(run: RunFolder) -> dict[str, Any]:
    test, train, right = run.metrics["test"], run.metrics["train"], run.answers.right
    return {
        "run": str(run.path),
        "model": run.recipe["model"],
        "method": run.recipe["method"]["name"],
        "trainable_parameters": train["trainable_parameters"],
        "adapter_bytes": run.adapter_bytes,
        "seconds": train["seconds"],
        "test_rows": len(right),
        "wrong": int((~right).sum()),
        "accuracy": test["accuracy"],
        "accuracy_interval": list(wilson(int(right.sum()), len(right))),
        "macro_f1": test["macro_f1"],
        "macro_f1_interval": list(macro_f1_interval(test["confusion"])),
    }


def _pair(first: RunFolder, second: RunFolder) -> dict[str, Any]:
    hits = [
        {
            (text, run.labels[truth]): bool(right)
            for text, truth, right in zip(run.answers.texts, run.answers.truth, run.answers.right, strict=True)
        }
        for run in (first, second)
    ]
    shared = hits[0].keys() & hits[1].keys()
    same = hits[0].keys() == hits[1].keys()
    made: dict[str, Any] = {
        "first": str(first.path), "second": str(second.path), "same_test_rows": same, "shared_rows": len(shared)
    }  # fmt: skip
    if same:
        only_first = sum(hits[0][row] and not hits[1][row] for row in shared)
        only_second = sum(hits[1][row] and not hits[0][row] for row in shared)
        made |= {"only_first": only_first, "only_second": only_second, "p": mcnemar(only_first, only_second)}
    return made
