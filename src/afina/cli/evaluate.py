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
    data: Annotated[Path | None, typer.Option(help="Labelled CSV file (default: the run's own test rows)")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text (default: as in training)")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label (default: as in training)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a tuned model on labelled rows."""
    quiet()
    from afina.data.clean import normalised
    from afina.data.table import read_csv
    from afina.errors import ConfigError, DataError, Problems, shortened
    from afina.training.trained import TrainedRun

    trained = TrainedRun.load(run)
    names = (text or trained.recipe.data.text, label or trained.recipe.data.label)
    path = data or run / "data" / "test.csv"
    rows = read_csv(path, set(names))
    problems = Problems("afina evaluate")
    for option, name in zip(("--text", "--label"), names, strict=True):
        if missing := rows.missing(name):
            problems.add(f"{option}: {missing}")
    problems.raise_as(ConfigError)
    classes = {normalised(name): i for i, name in enumerate(trained.task.labels)}
    pairs = [(row[names[0]].strip(), normalised(row[names[1]])) for row in rows.rows]
    usable = [(one, wanted) for one, wanted in pairs if one and wanted]
    unknown = sorted({wanted for _, wanted in usable if wanted not in classes})
    if unknown:
        raise DataError(
            f"{path}: labels the model does not know: {shortened(unknown)}. It knows {shortened(trained.task.labels)}"
        )
    if not usable:
        raise DataError(f"{path} has no row with both a text and a label")
    metrics = trained.task.metrics(trained.probabilities([one for one, _ in usable]), [classes[w] for _, w in usable])
    if as_json:
        print(json.dumps(metrics, ensure_ascii=False))
        return
    heading(f"{metrics['rows']} rows of {path}")
    if len(usable) < len(pairs):
        console().print(f"  {len(pairs) - len(usable)} rows without a text or label were left out")
    table(
        ["accuracy", "macro F1", "loss"],
        [[f"{metrics['accuracy']:.1%}", f"{metrics['macro_f1']:.3f}", f"{metrics['loss']:.3f}"]],
    )
    print()
    figures = [[n, *(f"{m[k]:.1%}" for k in ("precision", "recall")), m["rows"]] for n, m in metrics["per_class"].items()]
    table(["class", "precision", "recall", "rows"], figures, right=["precision", "recall", "rows"])
