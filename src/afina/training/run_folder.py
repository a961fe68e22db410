"""What a run writes into its folder beside the adapter; each file whole or not at all."""

from __future__ import annotations

import csv
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from afina.core.files import write_atomically
from afina.data.divide import Divided
from afina.data.example import Example
from afina.report.html import REPORT
from afina.report.statistics import histogram
from afina.tasks.reference import REFERENCE
from afina.tasks.sounds import SoundTask
from afina.tasks.task import Encoded, Rows, Task
from afina.training.recipe import Recipe

__all__ = [
    "ADAPTER",
    "METRICS",
    "RECIPE",
    "emptied",
    "versions",
    "write_csv",
    "write_data",
    "write_json",
    "write_predictions",
    "write_recipe",
]

RECIPE, ADAPTER, DATA, METRICS, PREDICTIONS = "recipe.yaml", "adapter", "data", "metrics.json", "predictions.csv"


def emptied(output: Path) -> None:
    """Remove what an earlier run has written, where there is one."""
    if (output / RECIPE).is_file():
        for name in (RECIPE, METRICS, PREDICTIONS, REPORT, "log.jsonl"):
            (output / name).unlink(missing_ok=True)
        for name in (ADAPTER, DATA, REFERENCE, "checkpoints", "pictures", "tensorboard"):
            shutil.rmtree(output / name, ignore_errors=True)


def write_data(
    output: Path, file: str, task: Task, columns: Mapping[str, str], rows: Mapping[str, Rows], divided: Divided,
    encoded: Encoded,
) -> None:  # fmt: skip
    """The rows of each side as they are trained on, and what was done with those of `file`."""
    (output / DATA).mkdir(parents=True, exist_ok=True)
    for name, side in rows.items():
        lines = [[*(e.row[role] for role in columns), e.line] for e in side.examples]
        write_csv(output / DATA / f"{name}.csv", [*columns.values(), "line"], lines)
    lengths = sorted(encoded.lengths)
    last = len(lengths) - 1
    report = {
        "file": file,
        "columns": columns,
        **divided.report(),
        "notes": [*divided.notes, *encoded.notes],
        "truncated": encoded.truncated,
        "max_length": encoded.max_length,
    }
    if lengths[0] != lengths[-1] or task.tokenizer is not None:
        report |= {
            "unit": task.unit,
            **({"rate": task.rate} if isinstance(task, SoundTask) else {}),
            "tokens": {f"{share} %": lengths[last * share // 100] for share in (0, 5, 25, 50, 75, 95, 100)},
            "token_histogram": histogram(lengths),
        }
    write_json(output / DATA / "data_report.json", report)


def write_recipe(output: Path, recipe: Recipe, labels: Sequence[str]) -> None:
    """The recipe, fully resolved: the run repeats from it alone."""
    head = "# The whole run. To repeat it: afina train recipe.yaml --output ANOTHER_FOLDER\n"
    named = "".join(f"#   {i}  {json.dumps(label, ensure_ascii=False)}\n" for i, label in enumerate(labels))
    classes = f"# Classes, in the order of the model's outputs:\n{named}" if named else ""
    text = f"{head}{classes}{recipe.to_yaml()}"
    write_atomically(output / RECIPE, lambda path: path.write_text(text, encoding="utf-8"))


def write_predictions(
    output: Path, task: Task, columns: Mapping[str, str], examples: Sequence[Example], answers: Sequence[Any],
    before: Sequence[Mapping[str, str]],
) -> None:  # fmt: skip
    """The test rows with the model's answers, and those from `before` the run where there are some."""
    rows, titles = [], list[str]()
    tabled = task.tabled(answers, examples)
    for i, (example, answer, said) in enumerate(zip(examples, answers, tabled, strict=True)):
        right = task.right(answer, example)
        if before:
            said["before"] = before[i]["answer"]
            said |= {"reward before": before[i]["reward"]} if "reward" in before[i] else {}
        titles = ["answer", *([] if right is None else ["right"]), *(k for k in said if k != "answer")]
        known = {**said, "right": "yes" if right else "no"}
        rows.append([example.line, *(example.row[role] for role in columns), *(known[k] for k in titles)])
    write_csv(output / PREDICTIONS, ["line", *columns.values(), *titles], rows)


def versions() -> dict[str, str]:
    """Of Python and the libraries that a result depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("afina", "torch", "transformers", "tokenizers", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file whole or not at all."""

    def write(beside: Path) -> None:
        with beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(_Lines(file))  # which ends records by \r\n, so that a text with either is quoted
            writer.writerow(columns)
            writer.writerows(rows)

    write_atomically(path, write)


class _Lines:
    """Ends each record by a line feed alone."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, record: str) -> None:
        self.file.write(record.removesuffix("\r\n") + "\n")
