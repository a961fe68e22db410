"""The model card of a run: `adapter/README.md`, in the form that model hubs read.

It says what a stranger needs who has the adapter folder alone: the task, the data, the figures beside the baselines, how to
load it, and where it ends. The base's licence is not known here, and that is said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from afina.core.files import write_atomically
from afina.report.cells import TAGGED
from afina.report.folder import RunFolder, read_run
from afina.report.markup import cut
from afina.report.preferred import POLICIES
from afina.report.scores import intervals
from afina.report.usage import python_lines
from afina.report.words import counted, duration, percent

__all__ = ["CARD", "card", "write_card"]

CARD = "README.md"
_PIPELINES = {
    "audio_classification": "audio-classification",
    "causal_lm": "text-generation", "image_classification": "image-classification",
    "multi_label_classification": "text-classification",
    "question_answering": "question-answering", "regression": "text-classification",
    "reranking": "text-ranking",
    "semantic_segmentation": "image-segmentation",
    "sentence_similarity": "sentence-similarity", "seq2seq": "text2text-generation",
    "speech_recognition": "automatic-speech-recognition",
    "sequence_classification": "text-classification", **dict.fromkeys(TAGGED, "token-classification"),
    "reward": "text-classification", **dict.fromkeys(POLICIES, "text-generation"),
}  # fmt: skip
_KNOWN = 30  # labels that are listed
_HERE = "PATH/OF/THIS/FOLDER"


def card(run: RunFolder) -> str:
    """The whole card."""
    name, method = run.path.resolve().name, str(run.recipe["method"]["name"])
    parts = [
        f"---\n{yaml.safe_dump(_head(run, name, method), sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(name)}: {method} adapter for {run.task.replace('_', ' ')}",
        _about(run, method),
        "## How good it is",
        _figures(run),
        "## What it was trained on",
        _data(run),
        "## How to load it",
        f"```python\n{python_lines(run, _HERE)}\n```",
        "## Limits",
        _limits(run),
        "## Licence",
        "The licence of the base model and that of the training data are not recorded here. Look both up before you pass "
        "this adapter on.",
    ]
    return "\n\n".join(parts) + "\n"


def write_card(run: Path | RunFolder) -> None:
    """Write the card of a finished run into its adapter folder; a card that a person has written stays."""
    path = (run.path if isinstance(run, RunFolder) else run) / "adapter" / CARD
    if path.is_file() and "\n- afina\n" not in path.read_text(encoding="utf-8"):
        return
    text = card(run if isinstance(run, RunFolder) else read_run(run))
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def _head(run: RunFolder, name: str, method: str) -> dict[str, Any]:
    base, pipeline = str(run.adapter.get("base_model_name_or_path") or ""), _PIPELINES.get(run.task)
    known = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not base.startswith(".")
    numbers = {key: run.test[key] for key in run.figures if isinstance(run.test[key], int | float)}
    file = Path(str(run.data.get("file") or "rows")).name
    metrics = [{"type": key, "value": round(value, 6), "name": run.figures[key].title} for key, value in numbers.items()]
    result = {"task": {"type": pipeline or run.task}, "dataset": {"name": file, "type": "file", "split": "test"},
              "metrics": metrics}  # fmt: skip
    return {
        **({"base_model": base} if known else {}),
        "library_name": "peft",
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": [method, "afina"],
        "model-index": [{"name": name, "results": [result]}],
    }


def _about(run: RunFolder, method: str) -> str:
    train, base = run.metrics["train"], run.adapter.get("base_model_name_or_path") or run.recipe["model"]
    trained, total = train["trainable_parameters"], train["total_parameters"]
    took = f"{duration(train['seconds'])}, {train.get('steps', 0):,} steps"
    lines = [
        f"- base: `{base}`",
        f"- method: {method}, {trained:,} of {total:,} parameters ({percent(trained / max(1, total), 2)})",
        f"- training: {took}, the weights of epoch {train['best_epoch']}",
    ]
    if run.labels:
        more = f" and {len(run.labels) - _KNOWN} more" if len(run.labels) > _KNOWN else ""
        lines.append(f"- answers: {', '.join(_plain(label) for label in run.labels[:_KNOWN])}{more}")
    return "\n".join(lines)


def _figures(run: RunFolder) -> str:
    known = intervals(run)
    columns = ["", "this adapter", "95 % interval", *run.baselines]
    rows = []
    for key, shown in run.figures.items():
        ends = " to ".join(map(shown.said, known[key])) if key in known else ""
        less = " (less is better)" if shown.better < 0 else ""
        others = (shown.said(made.get(key)) for made in run.baselines.values())
        rows.append([f"{shown.title}{less}", shown.said(run.test[key]), ends, *others])
    said = f"On {counted(len(run.rows), 'test row')} that were read once, after training:"
    return f"{said}\n\n{_table(columns, rows)}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line if set(line) <= set('-:') else _plain(line) for line in row)} |" for row in lines)


def _data(run: RunFolder) -> str:
    splits, file = run.data["splits"], Path(str(run.data.get("file") or "rows")).name
    sides = ", ".join(f"{made['rows']:,} for {name}" for name, made in splits.items())
    columns = ", ".join(f"{role.replace('_', ' ')} “{_plain(name)}”" for role, name in run.data["columns"].items())
    lines = [f"- `{file}`, {run.data['rows']:,} rows, {run.data['kept']:,} of them used: {sides}", f"- columns: {columns}"]
    counts = {label: made for label, made in run.data["classes"].items() if isinstance(made, int)}
    if 0 < len(counts) <= _KNOWN:
        lines.append(f"- rows of each class: {', '.join(f'{_plain(label)} {count:,}' for label, count in counts.items())}")
    return "\n".join(lines)


def _limits(run: RunFolder) -> str:
    lines = [f"- The figures hold for rows like those of the file. On other {run.what}s measure again: `afina evaluate`."]
    if length := run.data.get("max_length"):
        read = f"in windows of {length} tokens" if run.task == "question_answering" else f"up to {length} tokens"
        lines.append(f"- Texts were read {read}; of longer ones the command line does the same.")
    if run.classifies:
        lines.append(f"- Every {run.what} gets one of the classes, also one that belongs to none of them.")
    counts = [made["rows"] for made in run.test.get("per_class", {}).values()]
    if counts and min(counts) < 10:
        lines.append("- Some classes have fewer than ten test rows; their figures are rough.")
    if run.task == "reward":
        lines.append("- Its numbers rank answers to one prompt. Beside those of another prompt they mean nothing.")
    if run.task in ("causal_lm", "seq2seq", *POLICIES):
        lines.append("- What it writes may be wrong, and sounds alike when it is.")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A user's text that Markdown reads as text."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", cut(" ".join(str(text).split()), 80))
