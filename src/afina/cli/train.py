"""`afina train`: from a CSV file to a tuned, tested and saved classifier."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from afina.cli.show import console, heading, pairs, quiet, table

if TYPE_CHECKING:
    from afina.errors import Problems
    from afina.training.recipe import Recipe
    from afina.training.run import Run

__all__ = ["train"]

# option -> where the recipe keeps it
PLACES = {
    "data": "data.file", "text": "data.text", "text_pair": "data.text_pair", "label": "data.label", "model": "model",
    "method": "method.name", "task": "task.name",
    "epochs": "training.epochs", "batch_size": "training.batch_size", "learning_rate": "training.learning_rate",
    "max_length": "training.max_length", "max_truncated": "training.max_truncated", "precision": "training.precision",
    "gradient_accumulation": "training.gradient_accumulation", "seed": "training.seed",
}  # fmt: skip
MOST_CLASSES = 8  # columns that fit on a screen
TYPED = {place: f"--{option.replace('_', '-')}" for option, place in PLACES.items()} | {"output": "--output"}


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE]...", help="A recipe, and options of the method, such as r=16."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="CSV, TSV, JSON, JSON Lines or Parquet file, or a folder.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column of a second text, where the task has one.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label or answer.")] = None,
    task: Annotated[str | None, typer.Option(help="See `afina tasks` (default: sequence_classification)")] = None,
    model: Annotated[str | None, typer.Option(help="minilm, a folder, or a hub id (default: minilm)")] = None,
    method: Annotated[str | None, typer.Option(help="See `afina methods` (default: lora)")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write the run into.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows (default: 5)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of one step (default: 16)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate (default: what suits the method)")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a text (default: the longest, up to the model's limit)")
    ] = None,
    max_truncated: Annotated[
        float | None, typer.Option(help="Largest share of texts that may be cut off (default: 0.3)")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16 (default: auto)")] = None,
    gradient_accumulation: Annotated[
        int | None, typer.Option(help="Parts a step is computed in, to save memory (default: 1)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split, new weights and order (default: 0)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the output folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output, with its recipe.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, and stop before training.")] = False,
) -> None:
    """Tune a classifier on a CSV file, test it on rows it never saw, and save it.

    afina train --data messages.csv --text message --label label --output runs/messages
    """
    given = {name: value for name, value in locals().items() if name in PLACES and value is not None}
    started = time.perf_counter()
    quiet()
    from afina.errors import Problems, StoppedError
    from afina.training.run import prepare

    problems = Problems("afina train")
    typed = list(arguments or [])
    if resume and output is not None and (output / "recipe.yaml").is_file():
        typed = typed if any(a.endswith((".yaml", ".yml")) for a in typed) else [str(output / "recipe.yaml"), *typed]
    recipe = assemble(given, typed, problems)
    run = prepare(
        recipe, output, spell=lambda place: TYPED.get(place, place), problems=problems, overwrite=overwrite, resume=resume
    )
    speaks = os.environ.get("RANK", "0") == "0"  # one of several processes that torchrun started
    if speaks:
        show_plan(run)
    if dry_run:
        console().print("\nNothing was trained or written (--dry-run).")
        return
    if speaks:
        heading("Training")
    try:
        metrics = run.execute(show_line)
    except StoppedError as stop:
        if speaks:
            again = shlex.join(["afina", "train", "--resume", "--output", str(output)])
            console(stderr=True).print(f"\n{stop}. To go on:\n  {again}", markup=False)
        raise typer.Exit(128 + stop.signal) from None
    if speaks:
        show_outcome(run, metrics, time.perf_counter() - started)


def assemble(given: dict[str, Any], arguments: list[str], problems: Problems) -> Recipe:
    """The recipe that a file and the options typed over it make; what cannot be understood is added to `problems`."""
    from afina.cli.assignments import method_options
    from afina.core.registry import methods
    from afina.training.recipe import Recipe, read_recipe

    files = [a for a in arguments if a.endswith((".yaml", ".yml")) and "=" not in a]
    if len(files) > 1:
        problems.add(f"one recipe at a time: {', '.join(files)}")
    recipe = read_recipe(Path(files[0])) if files else Recipe()
    for name, value in given.items():
        section, _, key = PLACES[name].rpartition(".")
        if section in ("method", "task"):
            if value != getattr(recipe, section).get("name"):
                setattr(recipe, section, {"name": value})
        else:
            setattr(getattr(recipe, section) if section else recipe, key, value)
    words = [a for a in arguments if a not in files]
    words = section_options(words, recipe, problems)
    chosen = methods().get(str(recipe.method["name"]))
    if chosen is not None:  # else its name is a problem that the recipe's own check tells
        recipe.method.update(method_options(words, chosen.config, chosen.name, problems))
    return recipe


def section_options(words: list[str], recipe: Recipe, problems: Problems) -> list[str]:
    """Put every `training.KEY=VALUE`, `data.KEY=VALUE` and `task.KEY=VALUE` into the recipe; returns the other words."""
    from afina.errors import did_you_mean
    from afina.tasks.catalogue import tasks
    from afina.training.recipe import parse_value

    others = []
    for word in words:
        place, equals, text = word.partition("=")
        section, _, rest = place.strip().replace("-", "_").partition(".")
        if section not in ("training", "data", "task") or not equals or not rest:
            others.append(word)
            continue
        chosen = tasks().get(str(recipe.task.get("name")))
        if section == "task" and chosen is None:
            continue  # the task's name is a problem that the recipe's own check tells
        target: Any = chosen.Options if section == "task" and chosen else getattr(recipe, section)
        *above, key = rest.split(".")
        for name in above:
            target = getattr(target, name, None)
        hints = get_type_hints(target if isinstance(target, type) else type(target)) if target is not None else {}
        if key not in hints:
            problems.add(f"{place!r} is no key of a recipe.{did_you_mean(key, hints)}")
            continue
        try:
            value = parse_value(text.strip(), hints[key])
        except ValueError as error:
            problems.add(f"{word}: {error}")
            continue
        if section == "task":
            recipe.task[key] = value
        else:
            setattr(target, key, value)
    return others


def show_plan(run: Run) -> None:
    """What is about to happen, before it does."""
    recipe, model = run.recipe, run.model
    injected = model.adapters.injected["default"]
    trainable, total = model.get_nb_trainable_parameters()
    whole = f"{len(injected.saved)} trained whole" + (
        f" ({', '.join(injected.saved)})" if 0 < len(injected.saved) < 7 else ""
    )
    heading("Model")
    pairs(
        {
            "base": f"{recipe.model}, {type(model.get_base_model()).__name__}, {total:,} parameters",
            "method": " ".join(str(v) if k == "name" else f"{k}={v}" for k, v in short(recipe.method).items()),
            "layers": f"{len(injected.adapted)} adapted, {whole}, {frozen_layers(model)} frozen (see `afina targets`)",
            "trained": f"{trainable:,} parameters, {trainable / total:.2%} of all",
        }
    )
    heading("Data")
    cleaned = run.divided.cleaned
    pairs(
        {
            "file": f"{recipe.data.file}: {cleaned.rows} rows, {cleaned.kept} used",
            "": "\n".join([*run.divided.notes, *cleaned.lines()] or ["none dropped"]),
        }
    )
    labels = run.task.labels if run.task.kind.labels == "class" else []
    columns = labels if len(labels) <= MOST_CLASSES else []
    rows = [[name, len(side.examples), *(run.classes(name)[x] for x in columns)] for name, side in run.rows.items()]
    table(["rows", "all", *columns], rows, right=["all", *columns])
    if len(labels) > MOST_CLASSES:
        sizes = sorted(run.classes("train").values())
        pairs({"classes": f"{len(labels)}, of {sizes[0]} to {sizes[-1]} training rows"})
    lengths = sorted(run.encoded.lengths)
    pairs(
        {
            "tokens": f"{lengths[len(lengths) // 2]} a row in the middle, {lengths[-1]} at most; "
            f"{run.encoded.truncated} rows cut off at {run.encoded.max_length}"
        }
    )
    example, tokens, aimed = run.example()
    heading(f"One training row as the model sees it (line {example.line})")
    parts = {run.columns[role]: example.row[role] for role in run.columns}
    pairs({**parts, f"tokens{' ' if 'tokens' in parts else ''}": " ".join(tokens)})
    if any(aimed):
        pairs({"supervised": " ".join(token for token, target in zip(tokens, aimed, strict=True) if target)})
    elif example.label in labels:
        pairs({"class": f"{labels.index(example.label)}"})
    options = recipe.training
    steps = -(-len(run.rows["train"].features) // options.batch_size)
    heading("Plan")
    pairs(
        {
            "epochs": f"{options.epochs} of {steps} steps, {options.batch_size} rows a step",
            "learning rate": f"{options.learning_rate:g} at its peak",
            "precision": run.precision + (" (trained weights stay fp32)" if run.precision != "fp32" else ""),
            "optimizer": f"{options.optimizer}, {options.schedule} schedule",
            "kept": f"the weights with the best {options.best} on the validation rows, read every "
            f"{options.evaluate_every:g} {options.evaluate_unit}"
            + (f"; ends after {options.patience} readings without a better one" if options.patience else ""),
            "output": run.output,
        }
    )


def short(method: dict[str, Any]) -> dict[str, Any]:
    """The method's options that say something, without long lists."""
    said = {k: v for k, v in method.items() if v is not False and v != 0.0 and not (k == "init_lora_weights" and v is True)}
    return {k: (f"({len(v)} names)" if isinstance(v, list) and len(v) > 6 else v) for k, v in said.items() if v != "none"}


def frozen_layers(model: Any) -> int:
    """Modules with weights of their own that nothing trains."""
    adapters = model.adapters
    injected = adapters.injected["default"]
    touched = {key.split("#")[0] for key in injected.adapted} | set(injected.saved)
    weighty = [p for p, m in adapters.map.modules.items() if any(w is not None for w in m._parameters.values())]
    return sum(p not in touched and not any(p.startswith(f"{s}.") for s in injected.saved) for p in weighty)


def show_line(line: dict[str, Any]) -> None:
    """One line for each epoch; steps are in log.jsonl."""
    out = console()
    if "validation_loss" not in line:
        if out.is_terminal:
            print(f"  step {line['step']} of {line['of']}  loss {line['loss']:.3f}", end="\r", flush=True)
        return
    out.print(
        f"  epoch {line['epoch']}  loss {line['train_loss']:.3f}   validation: "
        + "  ".join(f"{k[11:].replace('_', ' ')} {v:.3f}" for k, v in line.items() if k.startswith("validation_"))
        + f"   {line['seconds']:.0f} s"
        + ("  best so far" if line["best"] else "")
    )


def show_outcome(run: Run, metrics: dict[str, Any], seconds: float) -> None:
    """The test figures beside what needs no model, the matrix, and where everything lies."""
    test, figures = metrics["test"], run.task.figures
    heading(f"Test: {test['rows']} rows that were read once, after training")
    compared = {"this model": test, **{m["title"]: m for m in metrics["baselines"].values()}}
    titles = [f.title for f in figures.values()]
    lines = [[name, *(f.shown(m.get(key)) for key, f in figures.items())] for name, m in compared.items()]
    table(["", *titles], lines, right=titles)
    if "confusion" in test and len(test["labels"]) <= MOST_CLASSES:
        print()
        answers = [f"answered {label}" for label in test["labels"]]
        rows = [
            [f"is {label}", *test["confusion"][i], *(f"{test['per_class'][label][k]:.1%}" for k in ("precision", "recall"))]
            for i, label in enumerate(test["labels"])
        ]
        table(["", *answers, "precision", "recall"], rows, right=[*answers, "precision", "recall"])
    train = metrics["train"]
    heading("Done")
    difference = metrics["read_back"]["largest_difference"]
    same = "the same answers" if difference == 0 else f"answers differ by {difference:.0e} at most"
    size = sum(p.stat().st_size for p in (run.output / "adapter").glob("*.safetensors"))
    pairs(
        {
            "kept": f"epoch {train['best_epoch']}",
            "took": f"{seconds:.0f} s, {train['seconds']:.0f} s of it training, {train['tokens_per_second']:,.0f} tokens/s, "
            f"{train['peak_memory_bytes'] / 2**30:.1f} GiB at most",
            "adapter": f"{run.output / 'adapter'} ({size / 2**20:.1f} MiB; loaded again and compared: {same})",
            "report": run.output / "report.html",
            "figures": run.output / "metrics.json",
            "test rows": run.output / "predictions.csv",
            "split": run.output / "data",
            "recipe": run.output / "recipe.yaml",
        }
    )
    console().print(f'\nTry it:  afina predict {run.output} --text "..."', markup=False)
