"""`afina predict`: answers of a tuned model, classifiers with the probability of every class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from afina.cli.show import console, quiet, table
from afina.report.words import counted

__all__ = ["predict"]

_SHOWN = 60  # characters of one word in the table


def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run, --output of `afina train`.")],
    text: Annotated[list[str] | None, typer.Option(help="A text; may be given several times.")] = None,
    file: Annotated[
        list[str] | None, typer.Option(help="A picture or recording, where the task reads them; may be given several times.")
    ] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option(help="The second text that goes with each --text, where the task has one.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="File of texts: CSV, TSV, JSON, JSON Lines, Parquet.")] = None,
    column: Annotated[str | None, typer.Option(help="Column of the text (default: as in training)")] = None,
    pair_column: Annotated[str | None, typer.Option(help="Column of the second text (default: as in training)")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write: CSV, --data with the answers; .npz, vectors.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Answer texts: of a classifier, the label and the probability of each class."""
    from afina.errors import ConfigError, Problems

    problems = Problems("afina predict")
    if not text and not file and data is None:
        problems.add('nothing to answer: give --text "...", --file PICTURE, or --data FILE.csv')
    if sum(map(bool, (data, text, file))) > 1:
        problems.add("--text, --file and --data exclude each other")
    if text_pair and len(text_pair) != len(text or []):
        problems.add(f"--text-pair is given {len(text_pair)} times and --text {len(text or [])} times; one goes with one")
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
    kind = trained.task.kind
    first = kind.input
    if (text and not kind.of_text) or (file and kind.of_text):
        given, wanted = ("--text", "--file FILE") if text else ("--file", '--text "..."')
        raise ConfigError(f"{given}: {trained.task.name} reads {kind.what}s; say {wanted}")
    known = kind.columns
    beside = [r for r, c in known.items() if c.required and c.asked and r not in (first, "text_pair", "label")]
    if beside and data is None:
        raise ConfigError(f"{'--text' if text else '--file'}: {trained.task.name} reads {' and '.join(beside)} too; give "
                          "rows by --data")  # fmt: skip
    asked = {role: name for role, name in trained.columns.items() if role != "label" and known[role].asked}
    read: Any = None
    if data is not None:
        from afina.data.media import locate
        from afina.data.read import read_table

        asked |= {role: name for role, name in ((first, column), ("text_pair", pair_column)) if name}
        read = read_table(data, set(asked.values()), read=kind.read, media=kind.media)
        asked |= {role: getattr(read, role) for role in kind.media if role in asked and getattr(read, role)}
        locate(read, [asked[role] for role in kind.media if role in asked])
        if output is not None and output.suffix == ".npz" and not pair_column and asked.get("text_pair") not in read.columns:
            asked.pop("text_pair", None)  # a vector is of one text
        for role, name in asked.items():
            if missing := read.missing(name):
                problems.add(f"--data: {missing} Say which with --{'column' if role == first else 'pair-column'}.")
        problems.raise_as(ConfigError)
        rows = [{role: row[name] for role, name in asked.items()} for row in read.rows]
    else:
        rows = [{first: one} for one in (text or file or [])]
        for row, other in zip(rows, text_pair or [], strict=False):
            row["text_pair"] = other
        if text_pair and "text_pair" not in trained.task.kind.columns:
            raise ConfigError(f"--text-pair: {trained.task.name} reads one text, not two")
        if text_pair and "text_pair" not in asked and trained.task.kind.columns.get("text_pair"):
            raise ConfigError("--text-pair: this run was trained on single texts and never saw a second one; leave it out")
        if "text_pair" in asked and not text_pair and trained.task.kind.columns["text_pair"].required:
            raise ConfigError(f"--text-pair is missing: {trained.task.kind.columns['text_pair'].help}")
    examples = trained.asked(rows, read.lines if read else ())
    full = [e for e in examples if e.text.strip()]
    if not full:
        raise ConfigError(f"every {kind.what} is empty")
    answers = iter(trained.answers(full))
    said = [next(answers) if e.text.strip() else None for e in examples]
    columns = [trained.task.columns(a, e) if a is not None else {} for a, e in zip(said, examples, strict=True)]
    titles = list(dict.fromkeys(title for made in columns for title in made))
    if output is not None and output.suffix == ".npz":
        import numpy as np

        from afina.core.files import write_atomically

        arrays = trained.task.arrays(said)
        output.parent.mkdir(parents=True, exist_ok=True)

        def write(beside: Path) -> None:
            with beside.open("wb") as file:
                np.savez(file, **arrays)

        write_atomically(output, write)
    elif output is not None:
        from afina.training.run_folder import write_csv

        lines = [[*row.values(), *(made.get(t, "") for t in titles)] for row, made in zip(read.rows, columns, strict=True)]
        output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(output, [*read.columns, *titles], lines)
    if as_json:
        for row, answer, example in zip(rows, said, examples, strict=True):
            inputs = {role: value for role, value in row.items() if value}
            nothing = dict.fromkeys(trained.task.respond(next(a for a in said if a is not None), full[0]))
            made = trained.task.respond(answer, example) if answer is not None else nothing
            print(json.dumps({**(inputs or {first: ""}), **made}, ensure_ascii=False))
    elif output is None:
        shown = [[_short(t, made.get(t, "" if i else "(empty)")) for i, t in enumerate(titles)] for made in columns]
        named = [t[2:-1] if t.startswith("p(") else t for t in titles]
        table([*named, kind.what], [[*s, row[first]] for s, row in zip(shown, rows, strict=True)], right=named[1:])
    if output is not None:
        kinds = [made["answer"] for made in columns if made]
        counts = {label: kinds.count(label) for label in trained.task.labels if trained.task.kind.labels == "class"}
        about = f" ({', '.join(f'{count} {label}' for label, count in counts.items())})" if counts else ""
        console(stderr=True).print(f"{len(full)} rows answered{about}: {output}", markup=False)
    if trained.truncated:
        many = f"{trained.truncated} of {len(full)} {kind.what}s"
        said_of = f"{many} are longer than those of training could be and were cut off"
        most = trained.recipe.training.max_length
        console(stderr=True).print(said_of + (f" at {most} tokens" if most else ""), markup=False)
    if len(full) < len(examples):
        empty = len(examples) - len(full)
        were = "was" if empty == 1 else "were"
        console(stderr=True).print(f"{counted(empty, 'empty text')} {were} not answered", markup=False)


def _short(title: str, value: str) -> str:
    """A probability as a person reads it, the beginning of one word that fills the screen; anything else as it is."""
    if title.startswith("p(") and value:
        return f"{float(value):.1%}"
    return value if len(value) <= _SHOWN or " " in value else f"{value[:_SHOWN]}…"
