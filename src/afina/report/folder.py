"""A run folder, read for a report: every file that is missing, broken or at odds with another is told together.

Nothing of torch or of the model is loaded. Probabilities lie in one array `[test rows, classes]`.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from afina.errors import CheckpointError, Problems

__all__ = ["Answers", "RunFolder", "read_run"]

_NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "metrics.json": {
        "test.rows": int, "test.accuracy": (int, float), "test.macro_f1": (int, float), "test.loss": (int, float),
        "test.per_class": dict, "test.confusion": list, "test.labels": list, "validation": dict, "baselines": dict,
        "train.seconds": (int, float), "train.best_epoch": (int, float), "train.trainable_parameters": int,
        "train.total_parameters": int, "versions": dict,
    },
    "recipe.yaml": {"model": str, "data.text": str, "data.label": str, "method.name": str, "training": dict},
    "data/data_report.json": {"splits": dict, "classes": dict, "rows": int, "kept": int},
    "adapter/adapter_config.json": {"peft_type": str},
}  # fmt: skip
_FIXED = ("line", None, None, "answer", "right")  # columns of predictions.csv before the probabilities; None: the recipe's


@dataclass
class Answers:
    """The test rows with what the model said, in file order."""

    lines: list[str]
    texts: list[str]
    truth: np.ndarray  # class numbers [rows]
    answer: np.ndarray  # class numbers [rows]
    probabilities: np.ndarray  # [rows, classes]

    @property
    def right(self) -> np.ndarray:
        """Whether each answer is the label."""
        return self.truth == self.answer


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
    epochs: list[dict[str, Any]]  # ... and one line an epoch
    answers: Answers

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of the model's outputs."""
        return [str(label) for label in self.metrics["test"]["labels"]]


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
    task = ((found.get("recipe.yaml") or {}).get("task") or {}).get("name")
    if task != "sequence_classification":
        problems.add(f"its task is {task}; reports are made of sequence_classification")
    steps, epochs = _log(texts["log.jsonl"], problems) if "log.jsonl" in texts else ([], [])
    problems.raise_as(CheckpointError, _cure(path))
    run = RunFolder(
        path, found["recipe.yaml"], found["metrics.json"], found["data/data_report.json"],
        found["adapter/adapter_config.json"], sum(p.stat().st_size for p in weights), steps, epochs,
        Answers([], [], np.zeros(0, int), np.zeros(0, int), np.zeros((0, 0))),
    )  # fmt: skip
    run.answers = _answers(run, texts["predictions.csv"], problems)
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


def _answers(run: RunFolder, text: str, problems: Problems) -> Answers:
    """The test rows; what they say together must be what metrics.json says."""
    name, labels, data = "predictions.csv", run.labels, run.recipe["data"]
    fixed = [column or data[key] for column, key in zip(_FIXED, ("", "text", "label", "", ""), strict=True)]
    expected = [*fixed, *(f"p({label})" for label in labels)]
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    number = {label: i for i, label in enumerate(labels)}
    answers = run.answers
    rows: list[list[str]] = []
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        problems.add(f"{name} is broken: {error}")
        return answers
    if not rows or rows[0] != expected:
        found = ", ".join(rows[0])[:200] if rows else "nothing"
        problems.add(f"{name} has the columns {found}; expected {', '.join(expected)[:200]}")
        return answers
    truth, answer, probabilities = [], [], []
    for i, row in enumerate(rows[1:], 2):
        try:
            if len(row) != len(expected):
                raise ValueError(f"{len(row)} fields, not {len(expected)}")
            answers.lines.append(row[0])
            answers.texts.append(row[1])
            truth.append(number[row[2]])
            answer.append(number[row[3]])
            probabilities.append([float(p) for p in row[len(_FIXED) :]])
        except (ValueError, KeyError) as error:
            problems.add(f"{name}, record {i} is broken: {error}")
            return answers
    if not truth:
        problems.add(f"{name} has no rows")
        return answers
    answers.truth, answers.answer = np.array(truth), np.array(answer)
    answers.probabilities = np.array(probabilities)
    test = run.metrics["test"]
    right = int(answers.right.sum())
    if len(truth) != test["rows"] or abs(right / len(truth) - test["accuracy"]) > 1e-6:
        problems.add(
            f"{name} has {right} of {len(truth)} rows right, metrics.json says {test['accuracy']:.4f} of {test['rows']}: "
            "the two are not of the same run"
        )
    return answers
