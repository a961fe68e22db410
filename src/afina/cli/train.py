"""`afina train`: from a file of rows to a tuned, tested and saved model."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afina.cli.assignments import PLACES, assemble, typed_as
from afina.cli.launch import are_to_be_started, command_again, end_with_the_launcher, launch
from afina.cli.preview import MOST_CLASSES, show_plan
from afina.cli.show import console, heading, pairs, quiet, table
from afina.memory.sizes import shown_size

if TYPE_CHECKING:
    from afina.training.running import Run

__all__ = ["train"]


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE]...", help="A recipe, and options of the method, such as r=16."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="CSV, TSV, JSON, JSON Lines or Parquet file, or a folder.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    image: Annotated[str | None, typer.Option(help="Column of the paths of pictures, where the task reads them.")] = None,
    audio: Annotated[str | None, typer.Option(help="Column of the paths of recordings, where the task reads them.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column of a second text, where the task has one.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label or answer.")] = None,
    task: Annotated[str | None, typer.Option(help="See `afina tasks` (default: sequence_classification)")] = None,
    reward: Annotated[
        str | None, typer.Option(help="What says how good an answer is, for grpo: FILE.py:function, or a run of a ranker")
    ] = None,
    model: Annotated[str | None, typer.Option(help="minilm, a folder, or a hub id (default: minilm)")] = None,
    start: Annotated[
        str | None, typer.Option(help="Run or adapter folder whose adapter is trained further (default: a new adapter)")
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `afina methods` (default: lora)")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write the run into.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows (default: 5)")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Rows of one step, or auto (default: 16)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate (default: what suits the method)")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a text (default: the longest, up to the model's limit)")
    ] = None,
    max_truncated: Annotated[
        float | None, typer.Option(help="Largest share of texts that may be cut off (default: 0.3)")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16 (default: auto)")] = None,
    gradient_accumulation: Annotated[
        str | None, typer.Option(help="Parts a step is computed in, to save memory, or auto (default: 1)")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Most memory of the device to take, as 11GB (default: all)")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Storage of the frozen weights: fp32, bf16, fp16, int8, nf4, ... (default: auto)")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Of several processes: ddp, fsdp2, zero2, zero3 (default: ddp)")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes of this machine that share each step; more machines: see the docs.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split, new weights and order (default: 0)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the output folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output, with its recipe.")
    ] = False,
    silent: Annotated[bool, typer.Option("--quiet", help="Show no progress of the training.")] = False,
    from_step: Annotated[
        int | None, typer.Option(help="With --resume: go on from the checkpoint of this step, and drop later ones.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, and stop before training.")] = False,
) -> None:
    """Tune a model on a file, test it on rows it never saw, and save it.

    afina train --data messages.csv --text message --label label --output runs/messages
    """
    given = {name: value for name, value in locals().items() if name in PLACES and value is not None}
    started = time.perf_counter()
    if processes is not None and are_to_be_started(processes):
        raise typer.Exit(launch(processes, sys.argv[1:]))
    end_with_the_launcher()
    quiet()
    from afina.errors import Problems, StoppedError
    from afina.training.progress import Progress
    from afina.training.run import prepare

    problems = Problems("afina train")
    typed = list(arguments or [])
    if resume and output is not None and (output / "recipe.yaml").is_file():
        typed = typed if any(a.endswith((".yaml", ".yml")) for a in typed) else [str(output / "recipe.yaml"), *typed]
    recipe = assemble(given, typed, problems)
    run = prepare(
        recipe,
        output,
        spell=typed_as,
        problems=problems,
        overwrite=overwrite,
        resume=resume,
        from_step=from_step,
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
        with Progress(run.task.figures, unit=run.task.unit, quiet=silent) as progress:
            metrics = run.execute(progress)
    except StoppedError as stop:
        if speaks:
            console(stderr=True).print(f"\n{stop}. To go on:\n  {command_again(output)}", markup=False)
        raise typer.Exit(128 + stop.signal) from None
    if speaks:
        show_outcome(run, metrics, time.perf_counter() - started)


def _shared(train: dict[str, Any]) -> dict[str, str]:
    """What was built of several processes, or of an engine that was asked for."""
    if train["processes"] == 1 and train["engine"] == "ddp":
        return {}
    held = f"{shown_size(train['weights_bytes_of_a_process'])} of {shown_size(train['weights_bytes'])} of weights in each"
    return {"processes": f"{train['processes']}, {train['engine']}: {held}"}


def show_outcome(run: Run, metrics: dict[str, Any], seconds: float) -> None:
    """The test figures beside what needs no model, the matrix, and where everything lies."""
    test, figures = metrics["test"], run.task.figures
    heading(f"Test: {test['rows']} rows that were read once, after training")
    compared = {"this model": test, **{m["title"]: m for m in metrics["baselines"].values()}}
    titles = [f.title for f in figures.values()]
    lines = [[name, *(f.shown(m.get(key)) for key, f in figures.items())] for name, m in compared.items()]
    table(["", *titles], lines, right=titles)
    for key, figure in figures.items():
        if f"{key}_interval" in test:
            low, high = (figure.shown(end) for end in test[f"{key}_interval"])
            console().print(f"  With 95 % confidence {figure.title} on more rows like these: {low} to {high}.", markup=False)
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
            **({"found": "\n".join(train["findings"])} if train["findings"] else {}),
            "kept": f"epoch {train['best_epoch']}",
            "took": f"{seconds:.0f} s, training {train['seconds']:.0f} s{' in all' if run.resume else ''}, "
            f"{train['tokens_per_second']:,.0f} {train['unit']}/s, "
            f"{train['peak_memory_bytes'] / 2**30:.1f} GiB at most",
            **_shared(train),
            **({"on the way": "\n".join(train["notes"])} if train["notes"] else {}),
            "adapter": f"{run.output / 'adapter'} ({size / 2**20:.1f} MiB; loaded again and compared: {same})",
            "report": run.output / "report.html",
            "figures": run.output / "metrics.json",
            "test rows": run.output / "predictions.csv",
            "split": run.output / "data",
            "recipe": run.output / "recipe.yaml",
        }
    )
    pair = ' --text-pair "..."' if "text_pair" in run.columns and run.task.kind.columns["text_pair"].asked else ""
    asked = f'--text "..."{pair}' if run.task.kind.of_text else "--file FILE"
    if "boxes" in run.columns:
        asked = "--data FILE --output answered.csv"
    console().print(f"\nTry it:  afina predict {run.output} {asked}", markup=False)
