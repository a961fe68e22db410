"""A run folder, read for a report: every file that is missing, broken or at odds with another is told together.

Nothing of torch or of the model is loaded. What a task's rows hold beyond this is read in `answers.py`.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from afina.errors import CheckpointError, Problems
from afina.report.words import percent

__all__ = ["SHARE_RIGHT", "Row", "RunFolder", "Shown", "read_run"]

_NUMBER = (int, float)
_NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "metrics.json": {
        "task.name": str, "figures": dict, "test.rows": int, "test.loss": _NUMBER, "validation": dict, "baselines": dict,
        "train.seconds": _NUMBER, "train.best_epoch": _NUMBER, "train.trainable_parameters": int,
        "train.total_parameters": int, "versions": dict,
    },
    "recipe.yaml": {"model": str, "data": dict, "method.name": str, "training": dict},
    "data/data_report.json": {"columns": dict, "splits": dict, "classes": dict, "rows": int, "kept": int},
    "adapter/adapter_config.json": {"peft_type": str},
}  # fmt: skip
# The figure that is the share of rows that are right, where a task has one.
_CLASSES = ("audio_classification", "image_classification", "sequence_classification")  # tasks with one class a row
SHARE_RIGHT = {**dict.fromkeys(_CLASSES, "accuracy"), "multi_label_classification": "subset_accuracy",
               "question_answering": "exact_match"}  # fmt: skip
_SURE = (*_CLASSES, "multi_label_classification")  # tasks that say the probability of every label


@dataclass(frozen=True)
class Shown:
    """How a figure of the task is shown; as `Figure` there."""

    title: str
    form: str = ".3f"
    better: int = 1

    def said(self, value: Any) -> str:
        """The figure as text; a dash where there is none."""
        if value is None:
            return "-"
        if self.form.endswith("%"):
            return percent(value, int(self.form.strip(".%") or 1))
        return format(value, self.form)


@dataclass
class Row:
    """One test row: its cells by role (text, text_pair, label), the answer, and what else the task says of it."""

    line: str
    given: dict[str, str]
    answer: str
    right: bool | None
    more: dict[str, str] = field(default_factory=dict)


@dataclass
class RunFolder:
    """Everything a report is made from."""

    path: Path
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    data: dict[str, Any]
    adapter: dict[str, Any]
    adapter_bytes: int
    steps: list[dict[str, Any]]  # of log.jsonl: one line a step ...
    epochs: list[dict[str, Any]]  # ... and one line an evaluation
    rows: list[Row] = field(default_factory=list)  # of predictions.csv
    intervals: dict[str, tuple[float, float]] | None = None  # of the figures, once `scores` has computed them

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.metrics["task"]["name"])

    @property
    def what(self) -> str:
        """What a row is: a text, a picture, a recording."""
        return str(self.data.get("what", "text"))

    @property
    def classifies(self) -> bool:
        """Whether every row has one class."""
        return self.task in _CLASSES

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of the model's outputs; none where the task has none."""
        return [str(label) for label in self.metrics["task"].get("labels", [])]

    @property
    def test(self) -> dict[str, Any]:
        """Figures of the test rows."""
        return dict(self.metrics["test"])

    @cached_property
    def figures(self) -> dict[str, Shown]:
        """The figures of the task that were measured, the most telling first."""
        known = Shown.__dataclass_fields__
        made = {key: Shown(**{k: v for k, v in said.items() if k in known}) for key, said in self.metrics["figures"].items()}
        return {key: shown for key, shown in made.items() if key in self.test}

    @property
    def baselines(self) -> dict[str, dict[str, Any]]:
        """Figures of answers that were not learned here, by their titles."""
        return {str(made.get("title", key)): made for key, made in self.metrics["baselines"].items()}

    @property
    def right(self) -> np.ndarray | None:
        """Whether each answer is right `[rows]`; None where that is no question of yes and no."""
        if not self.rows or any(row.right is None for row in self.rows):
            return None
        return np.array([bool(row.right) for row in self.rows])

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of each label `[rows, labels]`."""
        return np.array([[float(row.more[f"p({label})"]) for label in self.labels] for row in self.rows])

    def numbers_of(self, cells: list[str]) -> np.ndarray:
        """Places of labels in the order of the outputs `[cells]`."""
        place = {label: i for i, label in enumerate(self.labels)}
        return np.array([place[cell] for cell in cells], dtype=int)


def read_run(path: Path) -> RunFolder:
    """Read a finished run. Raises CheckpointError with everything that is missing or broken."""
    if not path.is_dir():
        raise CheckpointError(f"there is no run folder {path}")
    problems = Problems(str(path))
    texts: dict[str, str] = {}
    for name in (*_NEEDED, "log.jsonl", "predictions.csv"):
        try:
            texts[name] = (path / name).read_bytes().decode("utf-8")
        except FileNotFoundError:
            problems.add(f"{name} is missing")
        except UnicodeDecodeError as error:
            problems.add(f"{name} is not UTF-8 (byte {error.start})")
        except OSError as error:
            problems.add(f"{name} cannot be read: {error.strerror}")
    weights = [p for p in sorted((path / "adapter").glob("*.safetensors")) if p.is_file()]
    if not weights:
        problems.add("adapter/adapter_model.safetensors is missing")
    found = {name: _parsed(name, texts[name], problems) for name in _NEEDED if name in texts}
    steps, epochs = _log(texts["log.jsonl"], problems) if "log.jsonl" in texts else ([], [])
    problems.raise_as(CheckpointError, _cure(path))
    run = RunFolder(
        path, found["recipe.yaml"], found["metrics.json"], found["data/data_report.json"],
        found["adapter/adapter_config.json"], sum(p.stat().st_size for p in weights), steps, epochs,
    )  # fmt: skip
    for key, said in run.metrics["figures"].items():
        if not isinstance(said, Mapping) or "title" not in said:
            problems.add(f"metrics.json: figures.{key} is {str(said)[:40]!r}")
    if not set(run.metrics["figures"]) & set(run.test):
        problems.add(f"metrics.json lacks test.{next(iter(run.metrics['figures']), 'figures')}")
    problems.raise_as(CheckpointError, _cure(path))
    run.rows = _rows(run, texts["predictions.csv"], problems)
    problems.raise_as(CheckpointError, _cure(path))
    return run


def _cure(path: Path) -> str:
    if (path / "checkpoints").is_dir() and not (path / "metrics.json").exists():
        return "This run stopped before its end; `afina train ... --resume` goes on."
    return "Give the folder that was --output of `afina train`; what is broken comes back by training again with its recipe."


def _parsed(name: str, text: str, problems: Problems) -> dict[str, Any]:
    read: Callable[[str], Any] = yaml.safe_load if name.endswith(".yaml") else json.loads
    try:
        content = read(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        problems.add(f"{name} is broken: {' '.join(str(error).split())[:200]}")
        return {}
    if not isinstance(content, Mapping):
        problems.add(f"{name} holds no table of names and values")
        return {}
    for place, kind in _NEEDED[name].items():
        value: Any = content
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, kind):
            problems.add(f"{name} lacks {place}" if value is None else f"{name}: {place} is {str(value)[:40]!r}")
    return dict(content)


def _log(text: str, problems: Problems) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    steps, epochs = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            content = json.loads(line)
            float(content["step"]), float(content["epoch"])
            if "validation_loss" in content:
                epochs.append(content)
            else:
                float(content["loss"])
                steps.append(content)
        except (ValueError, KeyError, TypeError):
            problems.add(f"log.jsonl, line {number} is broken: {line[:60]!r}")
            break
    return steps, epochs


def _rows(run: RunFolder, text: str, problems: Problems) -> list[Row]:
    """The test rows; what they say together must be what metrics.json says. Columns are told by their places, since a
    column of the user's file may have any name."""
    name, roles = "predictions.csv", [str(role) for role in run.data["columns"]]
    expected = ["line", *(str(column) for column in run.data["columns"].values()), "answer"]
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        head, *lines = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    except csv.Error as error:
        problems.add(f"{name} is broken: {error}")
        return []
    more = head[len(expected) :]
    judged = more[:1] == ["right"]
    names = more[judged:]
    sure = [f"p({label})" for label in run.labels] if run.task in _SURE else []
    if head[: len(expected)] != expected or names[: len(sure)] != sure:
        found, wanted = ", ".join(head)[:200] or "nothing", ", ".join([*expected, *sure])[:200]
        problems.add(f"{name} has the columns {found}; expected {wanted}")
        return []
    known, rows = set(run.labels), list[Row]()
    for i, line in enumerate(lines, 2):
        given = dict(zip(roles, line[1:], strict=False))
        row = Row(line[0] if line else "", given, line[len(expected) - 1] if len(line) == len(head) else "", None)
        row.more = dict(zip(names, line[len(expected) + judged :], strict=False))
        row.right = (line[len(expected)] == "yes") if judged and len(line) == len(head) else None
        wrong = f"{len(line)} fields, not {len(head)}" if len(line) != len(head) else ""
        if not wrong and run.classifies:
            wrong = next((f"no class {x[:40]!r}" for x in (given["label"], row.answer) if x not in known), "")
        try:
            [float(row.more[column]) for column in sure]
        except (ValueError, KeyError) as error:
            wrong = wrong or str(error)
        if wrong:
            problems.add(f"{name}, record {i} is broken: {wrong}")
            return []
        rows.append(row)
    if not rows:
        problems.add(f"{name} has no rows")
    elif len(rows) != run.test["rows"]:
        problems.add(f"{name} has {len(rows)} rows, metrics.json says {run.test['rows']}: the two are not of the same run")
    elif (key := SHARE_RIGHT.get(run.task)) in run.test and judged:
        right = sum(bool(row.right) for row in rows)
        if abs(right / len(rows) - run.test[key]) > 1e-6:
            problems.add(
                f"{name} has {right} of {len(rows)} rows right, metrics.json says {run.test[key]:.4f}: the two are not of "
                "the same run"
            )
    return rows
