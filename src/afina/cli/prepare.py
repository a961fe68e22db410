"""`afina prepare`: the data part of a run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afina.cli.show import heading, pairs, table

__all__ = ["prepare"]


def prepare(
    data: Annotated[str, typer.Option(help="CSV, TSV, JSON, JSON Lines or Parquet file, or a folder.")],
    output: Annotated[Path, typer.Option(help="Folder to write train, validation and test rows and the report into.")],
    text: Annotated[str, typer.Option(help="Column of the text; its number where there is no header.")] = "",
    label: Annotated[str, typer.Option(help="Column of the label.")] = "",
    validation: Annotated[float, typer.Option(help="Share of rows that choose the best epoch.", min=0.01, max=0.5)] = 0.1,
    test: Annotated[float, typer.Option(help="Share of rows that are read once, at the end.", min=0.01, max=0.5)] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split: the same seed gives the same rows.", min=0)] = 0,
    header: Annotated[bool, typer.Option("--header/--no-header", help="Is the first row of a CSV its header?")] = True,
) -> None:
    """Clean and split a file of labelled texts, and report what was found.

    afina prepare --data messages.csv --text message --label label --output prepared
    """
    import json

    from afina.core.files import write_atomically
    from afina.data.divide import divided
    from afina.data.read import REPORT, read_table
    from afina.errors import ConfigError, DataError, MissingDependencyError, Problems

    problems = Problems("afina prepare")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        problems.add(f"--output {output} exists and is not empty; take another folder")
    rows = None
    try:
        rows = read_table(data, {text, label} - {""}, header=header)
    except (DataError, MissingDependencyError) as error:
        problems.add(f"--data: {error}")
    if rows is not None:
        text, label = text or rows.text, label or rows.label
        for option, column in (("--text", text), ("--label", label)):
            if not column:
                problems.add(f"{option} is missing: one of the columns {', '.join(rows.columns)}")
            elif missing := rows.missing(column):
                problems.add(f"{option}: {missing}")
        if text and text == label:
            problems.add(f"--text and --label are both {text!r}")
    problems.raise_as(ConfigError)
    assert rows is not None
    done = divided(rows, text, label, validation=validation, test=test, seed=seed)
    source = dict(zip(rows.lines, rows.rows, strict=True))
    output.mkdir(parents=True, exist_ok=True)
    for side, chosen in done.sides.items():
        examples = [done.examples[i] for i in chosen]
        lines = [json.dumps({**source[e.line], text: e.text, label: e.label}, ensure_ascii=False) for e in examples]
        content = "\n".join(lines) + "\n"
        write_atomically(output / f"{side}.jsonl", lambda path, content=content: path.write_text(content, encoding="utf-8"))  # type: ignore[misc]
    about = {"prepared_by": "afina prepare", "file": data, "text": text, "label": label, "seed": seed, **done.report()}
    written = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    write_atomically(output / REPORT, lambda path: path.write_text(written, encoding="utf-8"))
    heading("Data")
    found = [*done.notes, *done.cleaned.lines()]
    if done.near:
        found.append(f"{len(done.near)} groups of nearly equal texts, each kept on one side of the split")
    if done.leaks:
        found.append(f"{len(done.leaks)} rows dropped: nearly the same text is on the test or validation side")
    pairs({"file": f"{data}: {done.cleaned.rows} rows, {done.cleaned.kept} used", "": "\n".join(found or ["none dropped"])})
    labels = list(done.cleaned.classes)
    splits = done.report()["splits"]
    table(
        ["rows", "all", *labels], [[n, s["rows"], *s["classes"].values()] for n, s in splits.items()], right=["all", *labels]
    )
    pairs({"output": output})
