"""`afina evaluate`: figures of a tuned model on its test rows, or on another labelled file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from afina.cli.show import console, heading, quiet, table

__all__ = ["evaluate"]


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, --output of `afina train`.")],
    data: Annotated[Path | None, typer.Option(help="Labelled file (default: the run's own test rows)")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text (default: as in training)")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column of the second text (default: as in training)")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label (default: as in training)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a tuned model on labelled rows."""
    quiet()
    from afina.data.media import locate
    from afina.data.read import read_table
    from afina.errors import ConfigError, DataError, Problems
    from afina.training.trained import TrainedRun

    trained = TrainedRun.load(run)
    given = {"text": text, "text_pair": text_pair, "label": label}
    names = {role: given.get(role) or column for role, column in trained.columns.items()}
    path = data or run / "data" / "test.csv"
    media = trained.task.kind.media
    rows = read_table(path, set(names.values()), read=trained.task.kind.read, media=media)
    names |= {role: getattr(rows, role) for role in names if rows.path.is_dir() and media and getattr(rows, role)}
    locate(rows, [names[role] for role in media if role in names])
    problems = Problems("afina evaluate")
    known = trained.task.kind.columns
    names = {r: n for r, n in names.items() if n in rows.columns or known[r].required or known[r].asked}
    for role, name in names.items():
        if missing := rows.missing(name):
            problems.add(f"--{role.replace('_', '-')}: {missing}")
    problems.raise_as(ConfigError)
    try:
        examples = trained.examples([{role: row[n] for role, n in names.items()} for row in rows.rows], rows.lines)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    labelled = trained.task.kind.labels != "none"
    usable = [e for e in examples if e.text and (e.label or not labelled)]
    if not usable:
        raise DataError(f"{path} has no row with both a text and a label")
    metrics = trained.task.metrics(trained.answers(usable), usable)
    if as_json:
        print(json.dumps(metrics, ensure_ascii=False))
        return
    heading(f"{metrics['rows']} rows of {path}")
    if len(usable) < len(examples):
        console().print(f"  {len(examples) - len(usable)} rows without a text or label were left out")
    if trained.truncated:
        console().print(f"  {trained.truncated} rows are cut off at {trained.recipe.training.max_length} tokens")
    figures = {key: figure for key, figure in trained.task.figures.items() if key in metrics}
    table([f.title for f in figures.values()], [[f.shown(metrics[key]) for key, f in figures.items()]])
    if metrics.get("per_class"):
        print()
        each = [[n, *(f"{m[k]:.1%}" for k in ("precision", "recall")), m["rows"]] for n, m in metrics["per_class"].items()]
        table(["class", "precision", "recall", "rows"], each, right=["precision", "recall", "rows"])
