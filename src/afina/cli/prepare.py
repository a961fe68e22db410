"""`afina prepare`: the data part of a run alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afina.cli.assignments import assemble, typed_as
from afina.cli.preview import MOST_CLASSES
from afina.cli.show import heading, pairs, quiet, table

if TYPE_CHECKING:
    from afina.data.divide import Divided
    from afina.errors import Problems
    from afina.training.recipe import Recipe

__all__ = ["prepare"]


def prepare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE]...", help="A recipe, and keys of its data section."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="CSV, TSV, JSON, JSON Lines or Parquet file, or a folder.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write train, validation and test rows and the report into.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text; its number where there is no header.")] = None,
    image: Annotated[str | None, typer.Option(help="Column of the paths of pictures, where the task reads them.")] = None,
    audio: Annotated[str | None, typer.Option(help="Column of the paths of recordings, where the task reads them.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column of a second text, where the task has one.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    task: Annotated[str | None, typer.Option(help="See `afina tasks` (default: sequence_classification)")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of rows that choose the best epoch.")] = None,
    test: Annotated[float | None, typer.Option(help="Share of rows that are read once, at the end.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split: the same seed gives the same rows.")] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Is the first row of a CSV its header?")
    ] = None,
) -> None:
    """Clean and split a file of examples, and report what was found.

    afina prepare --data messages.csv --text message --label label --output prepared
    """
    chosen = {
        "data": data, "text": text, "image": image, "audio": audio, "text_pair": text_pair, "label": label, "task": task,
        "seed": seed,
    }  # fmt: skip
    quiet()
    from afina.data.columns import chosen_columns
    from afina.data.divide import divided
    from afina.errors import ConfigError, DataError, MissingDependencyError, Problems
    from afina.tasks.catalogue import find_task, tasks
    from afina.tasks.other_files import rows_of

    problems = Problems("afina prepare")
    words = [*(arguments or []), *_shares(validation, test, header)]
    recipe = assemble({k: v for k, v in chosen.items() if v is not None}, _about_data(words, problems), problems)
    _check(recipe, output, problems)
    rows, columns = None, dict[str, str]()
    kind = find_task(recipe.task["name"]).kind_for(recipe.task) if recipe.task.get("name") in tasks() else None
    if kind is not None and recipe.data.file:
        try:
            rows = rows_of(recipe.data, kind, typed_as)
            columns = chosen_columns(rows, kind, recipe.data, problems, typed_as)
        except (DataError, MissingDependencyError) as error:
            problems.add(f"{typed_as('data.file')}: {error}")
    problems.raise_as(ConfigError)
    assert output is not None
    assert rows is not None
    assert kind is not None
    done = divided(rows, kind, recipe.data, columns=columns, seed=recipe.training.seed)
    output.mkdir(parents=True, exist_ok=True)
    for side, chosen_rows in done.sides.items():
        whole = None if rows.running else rows.rows  # running text became rows as it was divided
        made = (_row(whole[done.rows[i]] if whole is not None else {}, done, i, columns) for i in chosen_rows)
        _write_rows(output / f"{side}.jsonl", made, rows.nested)
    _write_report(recipe, output, done, columns)
    _show(recipe, output, done)


def _shares(validation: float | None, test: float | None, header: bool | None) -> list[str]:
    given = {"validation": validation, "test": test, "header": header}
    return [f"data.{key}={value}" for key, value in given.items() if value is not None]


def _about_data(words: list[str], problems: Problems) -> list[str]:
    """Words that say something of the data; all others would do nothing here, and are told."""
    kept = []
    for word in words:
        place, equals, _ = word.partition("=")
        if equals and not place.strip().startswith(("data.", "task.", "training.seed")):
            problems.add(f"{word!r}: here a key of the recipe is one of its data, for example data.clean.duplicates=false")
        else:
            kept.append(word)
    return kept


def _check(recipe: Recipe, output: Path | None, problems: Problems) -> None:
    from afina.core.config import check_limits
    from afina.errors import ConfigError
    from afina.tasks.catalogue import find_task

    check_limits(recipe.data, problems, lambda name: typed_as(f"data.{name}"))
    check_limits(recipe.data.clean, problems, lambda name: typed_as(f"data.clean.{name}"))
    try:
        find_task(str(recipe.task.get("name", "")))
    except ConfigError as error:
        problems.add(f"{typed_as('task.name')}: {error}")
    if not recipe.data.file:
        problems.add(f"{typed_as('data.file')} is missing: the file or folder of the rows")
    if output is None:
        problems.add("--output is missing: the folder to write into, for example prepared")
    elif output.is_file() or (output.is_dir() and any(output.iterdir())):
        problems.add(f"--output {output} exists and is not empty; take another folder")


def _row(source: dict[str, str], done: Divided, i: int, columns: dict[str, str]) -> dict[str, str]:
    """All columns of a row, with what was repaired in those that are used."""
    row = done.examples[i].row
    return {**source, **{column: row[role] for role, column in columns.items()}}


def _write_rows(path: Path, rows: Iterable[dict[str, str]], nested: Collection[str]) -> None:
    """JSON lines; cells of `nested` columns are lists and objects again."""
    import json
    from contextlib import suppress

    from afina.core.files import write_atomically

    def cells(row: dict[str, str]) -> dict[str, Any]:
        made: dict[str, Any] = dict(row)
        for name in nested:
            with suppress(json.JSONDecodeError):  # a text among lists
                made[name] = json.loads(row[name])
        return made

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(cells(row), ensure_ascii=False) + "\n" for row in rows)

    write_atomically(path, write)


def _write_report(recipe: Recipe, output: Path, done: Divided, columns: dict[str, str]) -> None:
    import json

    from afina.core.files import write_atomically
    from afina.data.read import REPORT

    about: dict[str, Any] = {
        "prepared_by": "afina prepare", "file": recipe.data.file, "task": recipe.task["name"], "columns": columns,
        "seed": recipe.training.seed, **done.report(),
    }  # fmt: skip
    written = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    write_atomically(output / REPORT, lambda path: path.write_text(written, encoding="utf-8"))


def _show(recipe: Recipe, output: Path, done: Divided) -> None:
    heading("Data")
    found = "\n".join(done.lines() or ["none dropped"])
    pairs({"file": f"{recipe.data.file}: {done.cleaned.rows} rows, {done.cleaned.kept} used", "": found})
    splits = done.report()["splits"]
    labels = list(done.cleaned.classes)
    shown = labels if len(labels) <= MOST_CLASSES else []
    rows = [[name, side["rows"], *(side["classes"][x] for x in shown)] for name, side in splits.items()]
    table(["rows", "all", *shown], rows, right=["all", *shown])
    if len(labels) > MOST_CLASSES:
        sizes = sorted(splits["train"]["classes"].values())
        pairs({"classes": f"{len(labels)}, of {sizes[0]} to {sizes[-1]} training rows"})
    pairs({"output": output})
