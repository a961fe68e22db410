"""`afina predict`: answers of a tuned model, with the probability of every class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from afina.cli.show import console, quiet, table

__all__ = ["predict"]


def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run, --output of `afina train`.")],
    text: Annotated[list[str] | None, typer.Option(help="A text; may be given several times.")] = None,
    data: Annotated[Path | None, typer.Option(help="CSV file of texts.")] = None,
    column: Annotated[str | None, typer.Option(help="Column of the text (default: as in training)")] = None,
    output: Annotated[Path | None, typer.Option(help="CSV file to write: --data with answers and probabilities.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Answer texts: label and probability of each class."""
    from afina.errors import ConfigError, Problems

    problems = Problems("afina predict")
    if not text and data is None:
        problems.add('nothing to answer: give --text "..." or --data FILE.csv')
    if data is not None and text:
        problems.add("--text and --data exclude each other")
    if data is not None and output is None and not as_json:
        problems.add("--output is missing: the CSV file to write the answers to (or --json to print them)")
    if output is not None and data is None:
        problems.add("--output goes with --data")
    if output is not None and output.exists() and not overwrite:
        problems.add(f"--output {output} exists; take another name, or add --overwrite")
    problems.raise_as(ConfigError)

    quiet()
    from afina.training.trained import TrainedRun

    trained = TrainedRun.load(run)
    labels = trained.task.labels
    rows: Any = None
    texts = list(text or [])
    if data is not None:
        from afina.data.table import read_csv

        name = column or trained.recipe.data.text
        rows = read_csv(data, {name})
        if missing := rows.missing(name):
            raise ConfigError(f"--data: {missing} Say which with --column.")
        texts = [row[name] for row in rows.rows]
    full = [t for t in texts if t.strip()]
    if not full:
        raise ConfigError("every text is empty")
    probabilities = iter(trained.probabilities([t.strip() for t in full]))
    answers: list[dict[str, Any]] = []
    for one in texts:
        if one.strip():
            values = {label: float(p) for label, p in zip(labels, next(probabilities), strict=True)}
            answers.append({"text": one, "label": max(values, key=values.__getitem__), "probabilities": values})
        else:
            answers.append({"text": one, "label": None, "probabilities": {}})
    if output is not None:
        from afina.training.run import write_csv

        p_columns = [f"p({label})" for label in labels]
        lines = [
            (
                *row.values(),
                answer["label"] or "",
                *(f"{answer['probabilities'].get(label, ''):.6f}" if answer["label"] else "" for label in labels),
            )
            for row, answer in zip(rows.rows, answers, strict=True)
        ]
        output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(output, [*rows.columns, "answer", *p_columns], lines)
    empty = len(texts) - len(full)
    if as_json:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False))
    elif output is None:
        shown = [
            [
                a["label"] or "(empty)",
                *(f"{a['probabilities'][label]:.1%}" if a["label"] else "" for label in labels),
                a["text"],
            ]
            for a in answers
        ]
        table(["answer", *labels, "text"], shown, right=labels)
    if output is not None:
        counts = {label: sum(a["label"] == label for a in answers) for label in labels}
        said = ", ".join(f"{count} {label}" for label, count in counts.items())
        console(stderr=True).print(f"{len(full)} rows answered ({said}): {output}", markup=False)
    if empty:
        console(stderr=True).print(f"{empty} empty texts were not answered", markup=False)
