"""Runs side by side. Scores are compared only where they were measured on the same test rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from afina.errors import CheckpointError, ConfigError, Problems
from afina.report.folder import RunFolder, read_run
from afina.report.scores import intervals, row_scores
from afina.report.statistics import mcnemar, sign_flip

__all__ = ["compare_runs", "flat"]

_ABSENT = "-"


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Figures of each run, the options in which the recipes differ, and every pair on the same rows.

    `{"task": name, "shown": {figure: its title, form and direction}, "runs": [...], "differing": {option: [value of each
    run]}, "pairs": [...]}`. A pair holds `same_test_rows`, the number of `shared_rows` and, where the test rows are the same
    and have a score each, what is `scored` and the two-sided `p`: of McNemar's exact test with the rows that `only_first`
    and `only_second` have right, or of a sign-flip test with the mean `difference`, positive where the first is better.
    Raises CheckpointError with all that is wrong in all folders, ConfigError where the runs are of different tasks.
    """
    problems = Problems("afina compare")
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except CheckpointError as error:
            problems.add(str(error))
    problems.raise_as(CheckpointError)
    if len({run.task for run in runs}) > 1:
        said = ", ".join(f"{run.path} ({run.task})" for run in runs)
        raise ConfigError(f"afina compare: the runs are of different tasks: {said}. Compare runs of one task")
    recipes = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in ("model", "method.name"))
    differing = {k: [recipe.get(k, _ABSENT) for recipe in recipes] for k in keys}
    return {
        "task": runs[0].task,
        "shown": {key: asdict(shown) for run in runs for key, shown in run.figures.items()},
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
    train = run.metrics["train"]
    return {
        "run": str(run.path),
        "model": run.recipe["model"],
        "method": run.recipe["method"]["name"],
        "trainable_parameters": train["trainable_parameters"],
        "adapter_bytes": run.adapter_bytes,
        "seconds": train["seconds"],
        "test_rows": len(run.rows),
        "wrong": None if run.right is None else int((~run.right).sum()),
        "figures": {key: run.test[key] for key in run.figures},
        "intervals": {key: list(ends) for key, ends in intervals(run).items() if key in run.figures},
    }


def _pair(first: RunFolder, second: RunFolder) -> dict[str, Any]:
    keys = [_numbered(run) for run in (first, second)]
    shared = len(set(keys[0]) & set(keys[1]))
    same = set(keys[0]) == set(keys[1])
    made: dict[str, Any] = {
        "first": str(first.path), "second": str(second.path), "same_test_rows": same, "shared_rows": shared
    }  # fmt: skip
    (what, ours), (_, theirs) = row_scores(first), row_scores(second)
    if not same or not what or len(ours) != len(theirs):
        return made
    place = {key: i for i, key in enumerate(keys[1])}
    theirs = theirs[[place[key] for key in keys[0]]]
    made["scored"] = what
    if np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all():
        only_first, only_second = int((ours > theirs).sum()), int((theirs > ours).sum())
        return made | {"only_first": only_first, "only_second": only_second, "p": mcnemar(only_first, only_second)}
    return made | {"difference": float((ours - theirs).mean()), "p": sign_flip(ours - theirs)}


def _numbered(run: RunFolder) -> list[tuple[Any, ...]]:
    """What tells each test row from the others: its cells and, of rows that are alike, which of them it is."""
    seen = Counter[tuple[str, ...]]()
    keys = []
    for row in run.rows:
        cells = tuple(row.given.values())
        keys.append((*cells, seen[cells]))
        seen[cells] += 1
    return keys
