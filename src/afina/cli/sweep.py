"""`afina sweep`: several runs over one base, and which of them the validation rows like best."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afina.cli.assignments import PLACES, assemble, typed_in
from afina.cli.preview import show_plan
from afina.cli.show import console, heading, quiet, table

if TYPE_CHECKING:
    from afina.errors import Problems
    from afina.sweep.points import Found, Point

__all__ = ["sweep"]

_MOST = 1000  # points; a grid of more is a slip of the fingers


def sweep(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE.yaml KEY=VALUE,VALUE,...",
            help="A recipe, and values to try; a key with one value is the same in all. A list is one value: [query,value].",
        ),
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="Values to try: KEY=VALUE,VALUE (more may follow it).")
    ] = None,
    data: Annotated[str | None, typer.Option(help="CSV, TSV, JSON, JSON Lines or Parquet file, or a folder.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column of a second text, where the task has one.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label or answer.")] = None,
    task: Annotated[str | None, typer.Option(help="See `afina tasks` (default: sequence_classification)")] = None,
    model: Annotated[str | None, typer.Option(help="minilm, a folder, or a hub id (default: minilm)")] = None,
    method: Annotated[str | None, typer.Option(help="See `afina methods` (default: lora)")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows (default: 5)")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Rows of one step of each run (default: 16)")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16 (default: auto)")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write the sweep into, a run folder a point.")] = None,
    together: Annotated[
        int | None, typer.Option(min=1, help="Runs in one pass (default: as many as fit, where measured faster)")
    ] = None,
    chosen: Annotated[
        int | None, typer.Option("--random", min=1, help="Only so many points of the grid, drawn by --random-seed.")
    ] = None,
    random_seed: Annotated[int, typer.Option(help="Of --random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Skip finished points and go on with the others.")] = False,
    array: Annotated[
        str | None,
        typer.Option(help="K/N: train the K-th of N parts of the points; slurm: K and N are those of the SLURM array."),
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Train nothing: show what is in --output, and write its report.")
    ] = False,
    ray: Annotated[str | None, typer.Option(help="Train parts on a Ray cluster: its address, auto, or local.")] = None,
    parts: Annotated[
        int | None, typer.Option(min=1, help="With --ray: parts of the points (default: one a GPU, else one a machine)")
    ] = None,
    silent: Annotated[bool, typer.Option("--quiet", help="Show no progress of the training.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, and stop before training.")] = False,
) -> None:
    """Train a recipe with several values of some keys, in one pass over one base where that is possible.

    afina sweep recipe.yaml --output runs/rates --grid learning_rate=1e-4,3e-4,1e-3 r=8,16
    """
    given = {name: value for name, value in locals().items() if name in PLACES and value is not None}
    started = time.perf_counter()
    quiet()
    from afina.errors import ConfigError, Problems
    from afina.sweep.points import check_folder, read_points, results_of, write_points

    problems = Problems("afina sweep")
    if output is None:
        problems.add("--output is missing: the folder to write the sweep into, for example runs/rates")
        problems.raise_as(ConfigError)
    assert output is not None
    if collect:
        show_found(output, results_of(output, read_points(output)))
        return
    share = _share(array, problems) if array is not None else None
    if ray is not None and array is not None:
        problems.add("--ray divides the points itself; leave --array out")
    if parts is not None and ray is None:
        problems.add("--parts goes with --ray")
    typed = [*(grid or []), *(arguments or [])]
    points, varied = _points(typed, given, problems)
    if chosen is not None and chosen < len(points):
        points = sorted(random.Random(random_seed).sample(points, chosen), key=lambda point: point.number)
        for i, point in enumerate(points, 1):
            point.number = i
    try:
        check_folder(output, points, resume=resume, part=share is not None or ray is not None)
    except ConfigError as error:
        problems.add(str(error))
    problems.raise_as(ConfigError)
    if ray is not None and not dry_run:
        from afina.sweep.on_ray import train_on_ray

        train_on_ray(
            _without(sys.argv[1:], "--ray", "--parts"), ray, parts, len(points), console().print,
            lambda: write_points(output, points, {"grid": varied}),
        )  # fmt: skip
        show_found(output, results_of(output, points))
        return
    own = points if share is None else points[len(points) * (share[0] - 1) // share[1] : len(points) * share[0] // share[1]]
    _train(output, points, own, varied, together, dry_run=dry_run, silent=silent, started=started)


def _train(
    output: Path, points: list[Point], own: list[Point], varied: dict[str, list[str]], together: int | None, *,
    dry_run: bool, silent: bool, started: float,
) -> None:  # fmt: skip
    from afina.errors import StoppedError
    from afina.sweep.common import Common
    from afina.sweep.points import results_of, write_points
    from afina.sweep.sweep import check_points, train_points
    from afina.tasks.task import Figure

    finished = {one.point.number for one in results_of(output, points) if one.state == "finished"}
    left = [point for point in own if point.number not in finished]
    heading("Sweep")
    out = console()
    for key, values in varied.items():
        out.print(f"  {key}: {', '.join(values)}", markup=False)
    part = "" if len(own) == len(points) else f", {len(own)} of them in this part"
    done = f", {len(own) - len(left)} finished before" if len(left) < len(own) else ""
    out.print(f"  {len(points)} points{part}{done}")
    if left:
        common, typed = Common(), typed_in(sweep)
        groups, shown, notes = check_points(left, common, typed)
        for note in notes:
            out.print(f"  {note}", markup=False)
        out.print(f"\nThe first point, {left[0]}:", markup=False)
        show_plan(shown)
        known = {"loss": Figure("loss"), **shown.task.figures}
        del shown
        if dry_run:
            out.print("\nNothing was trained or written (--dry-run).")
            return
        write_points(output, points, {"grid": varied})
        heading("Training")

        def tell(point: Any, line: dict[str, Any]) -> None:
            if "validation_loss" in line and not silent:
                read = {key: line[f"validation_{key}"] for key in known if f"validation_{key}" in line}
                figures = [f"{known[key].title} {known[key].shown(value)}" for key, value in read.items()]
                best = "  best so far" if line["best"] else ""
                said = f"  point {point.number}  epoch {line['epoch']}  loss {line['train_loss']:.3f}   validation: "
                out.print(said + "  ".join(figures) + best, markup=False)

        def over(point: Any, result: Any) -> None:
            if isinstance(result, BaseException):
                out.print(f"  point {point.number} ({point}) failed: {result}", markup=False)
            else:
                out.print(f"  point {point.number} ({point}) is finished: {point.folder(output, len(points))}", markup=False)

        try:
            train_points(
                output, len(points), groups, common, together=together, spell=typed,
                say=lambda text: out.print(f"  {text}", markup=False), tell=tell, over=over,
            )  # fmt: skip
        except StoppedError as stop:
            console(stderr=True).print(f"\n{stop}. To go on, type the same with --resume.", markup=False)
            raise typer.Exit(128 + stop.signal) from None
    elif dry_run:
        return
    show_found(output, results_of(output, points), time.perf_counter() - started)


def show_found(output: Path, found: list[Found], seconds: float | None = None) -> None:
    """The table, the best first, and where everything lies."""
    from afina.report.folder import Shown
    from afina.report.words import duration
    from afina.sweep.page import write_page
    from afina.sweep.points import best_of

    best = best_of(found)
    heading("Points, by what the validation rows say")
    keys = list(dict.fromkeys(key for one in found for key in one.point.values))
    keys = [key for key in keys if len({one.point.values.get(key) for one in found}) > 1] or keys
    finished = sorted((one for one in found if one.state == "finished"), key=lambda one: one.score, reverse=True)
    title = best.title if best else "figure"
    rows: list[list[Any]] = []
    for one in finished:
        shown = Shown(one.title, one.form, one.better)
        rows.append([
            one.point.number, *(one.point.values.get(key, "") for key in keys), shown.said(one.validation.get(one.best_by)),
            f"{one.validation['loss']:.4f}", shown.said(one.test.get(one.best_by)), one.train["best_epoch"],
            duration(one.train["seconds"]), "best" if one is best else "",
        ])  # fmt: skip
    for one in found:
        if one.state != "finished":
            why = one.error.splitlines()[0][:100] if one.error else ""
            typed = (one.point.values.get(key, "") for key in keys)
            rows.append([one.point.number, *typed, "", "", "", "", "", f"{one.state} {why}"])
    columns = ["point", *keys, title, "loss", f"{title} of test", "kept epoch", "took", ""]
    table(columns, rows, right=[c for c in columns if c and c not in keys])
    out = console()
    if best is None:
        out.print("\nNo point is finished.")
    else:
        page = write_page(output, found)
        folder = best.folder
        out.print(f"\n  {title} and loss are of the validation rows, which choose the best; the test rows choose nothing.")
        out.print("  Of many points the best looks better than it is: believe its test figure, not its validation figure.")
        if seconds is not None:
            out.print(f"  All of it took {duration(seconds)}.")
        out.print(f"  report  {page}", markup=False)
        out.print(f'\nTry the best:  afina predict {folder} --text "..."', markup=False)


# --- what was typed


def _points(typed: Sequence[str], given: dict[str, Any], problems: Problems) -> tuple[list[Point], dict[str, list[str]]]:
    """All combinations, in the order typed, the last key changing fastest; and the values of each key."""
    from afina.errors import ConfigError
    from afina.sweep.points import Point

    files = [word for word in typed if word.endswith((".yaml", ".yml")) and "=" not in word]
    recipe = assemble(given, files, problems)
    axes: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    methods = [str(recipe.method["name"])]
    words = [word for word in typed if word not in files]
    for word in words:
        key, equals, text_ = word.partition("=")
        if equals and key.strip() in ("method", "method.name"):
            methods = _values(text_)
    told = len(problems.found)
    for word in words:
        key, equals, text_ = word.partition("=")
        key = key.strip().replace("-", "_")
        values = _values(text_)
        if not equals:
            problems.add(f"{word!r} is not understood; values to try are written key=value,value, for example r=8,16")
        elif (place := _place(key, methods, problems)) is None:
            pass
        elif not all(values):
            problems.add(f"{word}: a value is empty; values are separated by commas, for example {key}=1,2")
        elif place in axes:
            problems.add(f"{key} is given twice ({word}); give all its values at once")
        else:
            if repeated := sorted({value for value in values if values.count(value) > 1}):
                problems.add(f"{word}: {', '.join(repeated)} comes twice")
            axes[place], names[place] = values, key
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > _MOST:
        problems.add(f"the grid has {count:,} points; {_MOST:,} are the most. Take fewer values")
    elif count == 1 and len(problems.found) == told:
        problems.add("the grid is empty: give a key with several values, for example --grid learning_rate=1e-4,1e-3")
    problems.raise_as(ConfigError)
    points: list[Point] = []
    same: dict[str, int] = {}
    said = set[str]()
    for combination in itertools.product(*axes.values()):
        own = type(problems)("")
        values_of = dict(zip(axes, combination, strict=True))
        made = assemble(dict(given), [*files, *(f"{place}={value}" for place, value in values_of.items())], own)
        said.update(own.found)
        text_ = made.to_yaml()
        number = len(points) + 1
        if not own.found and text_ in same:
            problems.add(f"points {same[text_]} and {number} are the same: {', '.join(combination)}")
        same.setdefault(text_, number)
        points.append(Point(number, {names[place]: value for place, value in values_of.items()}, made))
    for problem in sorted(said):
        problems.add(problem)
    problems.raise_as(ConfigError)
    return points, {names[place]: values for place, values in axes.items()}


def _values(text: str) -> list[str]:
    """`a,b,[c,d]` as three values."""
    made, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            made.append("")
        else:
            made[-1] += letter
    return [value.strip() for value in made]


def _place(key: str, methods: Sequence[str], problems: Problems) -> str | None:
    """Where the recipe keeps a key, short or whole; None, and a problem, where it keeps none of that name."""
    from afina.core.registry import methods as known_methods
    from afina.errors import did_you_mean
    from afina.training.recipe import NOT_IN_RECIPES, TrainingOptions

    if key in ("model", "method", "task") or "." in key:
        return {"method.name": "method", "task.name": "task"}.get(key, key)
    if key in PLACES:
        return PLACES[key]
    chosen = [known_methods()[name] for name in methods if name in known_methods()]
    options = {f.name for method in chosen for f in dataclasses.fields(method.config)} - NOT_IN_RECIPES
    training = {f.name for f in dataclasses.fields(TrainingOptions)}
    if key in options:
        return f"method.{key}"
    if key in training:
        return f"training.{key}"
    known = {*options, *training, *PLACES}
    problems.add(f"{key!r} is no key of a recipe and no option of {' or '.join(methods)}.{did_you_mean(key, known)}")
    return None


def _share(text: str, problems: Problems) -> tuple[int, int]:
    """Which part of how many."""
    if text == "slurm":
        found = [os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "MIN", "COUNT")]
        if not found[0].isdigit() or not found[2].isdigit():
            problems.add("--array slurm: SLURM_ARRAY_TASK_ID and _COUNT are not set; start with sbatch --array=1-4")
            return 1, 1
        return int(found[0]) - int(found[1] or 0) + 1, int(found[2])
    first, _, of = text.partition("/")
    if not (first.isdigit() and of.isdigit() and 1 <= int(first) <= int(of)):
        problems.add(f"--array {text}: expected K/N with K from 1 to N, such as 2/4, or slurm")
        return 1, 1
    return int(first), int(of)


def _without(words: Sequence[str], *options: str) -> list[str]:
    """The command line without some options and their values."""
    made: list[str] = []
    skip = False
    for word in words:
        if skip or word.split("=")[0] in options:
            skip = not skip and word in options
            continue
        made.append(word)
    return made
