"""`afina dreambooth`: a diffusion model learns one subject from a few pictures of it."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afina.cli.assignments import assemble, typed_in
from afina.cli.launch import command_again
from afina.cli.plan import planned
from afina.cli.preview import show_plan
from afina.cli.show import console, heading, pairs, quiet
from afina.cli.train import show_outcome
from afina.errors import ConfigError, Problems, StoppedError

if TYPE_CHECKING:
    from afina.training.recipe import Recipe

__all__ = ["dreambooth"]

# What suits a few pictures, where neither recipe nor command line says otherwise.
_SUITED = {"training.batch_size": 1, "training.learning_rate": 1e-4, "training.evaluate_unit": "steps",
           "training.warmup": 0.0}  # fmt: skip
_READINGS = 8  # of the figure, over a run
_TYPED = {"data.file": "--data", "task.instance_prompt": "--prompt", "task.class_prompt": "--class-prompt",
          "task.class_folder": "--class-folder", "task.class_pictures": "--class-pictures",
          "task.resolution": "--resolution", "task.text_encoders": "--text-encoders", "task.show": "--show"}  # fmt: skip


def dreambooth(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.yaml] [KEY=VALUE]...", help="A recipe, and other options, such as r=8 or task.flip=true."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of the pictures of the subject; NAME.txt beside one is its prompt.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt of the pictures, with a rare word: 'a photo of sks dog'.")
    ] = None,
    class_prompt: Annotated[
        str | None, typer.Option(help="Prompt of its class, whose pictures are learned too: 'a photo of a dog'.")
    ] = None,
    class_folder: Annotated[
        str | None, typer.Option(help="Folder of the class's pictures; those missing are made (default: beside --output)")
    ] = None,
    class_pictures: Annotated[int | None, typer.Option(help="How many of them (default: 100)")] = None,
    model: Annotated[str | None, typer.Option(help="A pipeline of diffusers: a folder, or a hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="See `afina methods` (default: lora)")] = None,
    text_encoders: Annotated[bool | None, typer.Option("--text-encoders", help="Train the text encoders too.")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Pixels of a side (default: what the pipeline was made for)")
    ] = None,
    show: Annotated[
        list[str] | None, typer.Option(help="Prompt of pictures in the report; may be given several times.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write the run into.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of training (default: 500)")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Pictures of a step (default: 1)")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate (default: 0.0001)")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16 (default: auto)")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Storage of the frozen weights: fp32, bf16, fp16 (default: auto)")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Most memory of the device to take, as 11GB (default: all)")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute blocks again in backward: less memory, more time.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of new weights, noise and order (default: 0)")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it takes of memory, and stop. No weights are needed.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="With --plan: cpu or cuda (default: what is here)")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the output folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    silent: Annotated[bool, typer.Option("--quiet", help="Show no progress of the training.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show everything, and stop before training.")] = False,
) -> None:
    """Teach a diffusion model one subject from a few pictures of it, and save what it learned for diffusers.

    afina dreambooth --data pictures/ --prompt "a photo of sks dog" --model FOLDER --output runs/dog
    """
    given: dict[str, Any] = {
        "data": data, "model": model, "method": method, "batch_size": batch_size, "learning_rate": learning_rate,
        "precision": precision, "weights": weights, "memory": memory, "seed": seed,
    }  # fmt: skip
    options = {"instance_prompt": prompt, "class_prompt": class_prompt, "class_folder": class_folder, "show": show or None,
               "class_pictures": class_pictures, "resolution": resolution, "text_encoders": text_encoders}  # fmt: skip
    started = time.perf_counter()
    quiet()
    from afina.training.progress import Progress
    from afina.training.run import prepare

    problems = Problems("afina dreambooth")
    typed = list(arguments or [])
    if resume and output is not None and (output / "recipe.yaml").is_file() and not _recipes(typed):
        typed = [str(output / "recipe.yaml"), *typed]
    recipe = dreambooth_recipe(given, options, typed, problems, steps=steps, checkpointing=gradient_checkpointing)
    if recipe.task.get("class_prompt") and not recipe.task.get("class_folder"):
        from afina.diffusion.class_pictures import class_folder as usual

        beside = (output or Path("runs/first")).parent
        recipe.task["class_folder"] = str(usual(beside, recipe.model, recipe.task["class_prompt"]))
    if plan:
        planned(recipe, device, 1, False, problems, typed=spelled)
        return
    if device is not None:
        problems.add(f"--device {device} goes with --plan")
    checked = copy.deepcopy(recipe)
    checked.check(problems, spelled)
    if not recipe.data.file:
        problems.add("--data is missing: the folder of the pictures")
    if output is None and not dry_run:
        problems.add("--output is missing: the folder to write the run into, for example runs/dog")
    problems.raise_as(ConfigError)
    _make_class_pictures(checked, recipe, only_said=dry_run)
    run = prepare(recipe, output, spell=spelled, problems=problems, overwrite=overwrite, resume=resume, trial=dry_run)
    show_plan(run)
    if dry_run:
        console().print("\nNothing was trained or written (--dry-run).")
        return
    heading("Training")
    try:
        with Progress(run.task.figures, unit=run.task.unit, quiet=silent) as progress:
            metrics = run.execute(progress)
    except StoppedError as stop:
        console(stderr=True).print(f"\n{stop}. To go on:\n  {command_again(output)}", markup=False)
        raise typer.Exit(128 + stop.signal) from None
    show_outcome(run, metrics, time.perf_counter() - started)


def spelled(place: str) -> str:
    """How a key of the recipe is typed here."""
    return _TYPED.get(place) or typed_in(dreambooth)(place)


def dreambooth_recipe(
    given: dict[str, Any], options: dict[str, Any], typed: list[str], problems: Problems, *, steps: int | None,
    checkpointing: bool = False,
) -> Recipe:  # fmt: skip
    """The recipe of a command, or of a page: `given` by the names of the command line, `options` of the task.

    Without a recipe of their own, a few pictures are learned one at a time, at a rate that suits.
    """
    given = {name: value for name, value in given.items() if value is not None}
    named = {f"training.{name}" for name in given}
    suited = [] if _recipes(typed) else [f"{k}={v}" for k, v in _SUITED.items() if k not in named]
    recipe = assemble(given, ["task=dreambooth", *suited, *typed], problems)
    recipe.task |= {key: value for key, value in options.items() if value is not None}
    if checkpointing:
        recipe.memory.gradient_checkpointing = True
    if steps is not None or not _recipes(typed):
        rows = _rows(recipe)
        wanted = steps or 500
        each = -(-rows // recipe.training.batch_size) if isinstance(recipe.training.batch_size, int) else rows
        recipe.training.epochs = max(1, round(wanted / each))
        if not any(word.startswith("training.evaluate_every") for word in typed):
            recipe.training.evaluate_every = float(max(1, recipe.training.epochs * each // _READINGS))
            recipe.training.evaluate_unit = "steps"
    return recipe


def _recipes(typed: list[str]) -> list[str]:
    return [word for word in typed if word.endswith((".yaml", ".yml")) and "=" not in word]


def _rows(recipe: Recipe) -> int:
    """Rows that the pictures will make; one where they are not there."""
    from afina.diffusion.pictures import ENDINGS

    folder = Path(recipe.data.file).expanduser() if recipe.data.file else None
    own = sum(p.suffix.lower() in ENDINGS for p in folder.iterdir()) if folder is not None and folder.is_dir() else 1
    others = int(recipe.task.get("class_pictures", 100)) if recipe.task.get("class_prompt") else 0
    return max(1, own, others)


def _make_class_pictures(recipe: Recipe, asked: Recipe, *, only_said: bool) -> None:
    """Those that are missing, with a word before and after; where that is `only_said`, what is `asked` goes on without them.

    `recipe` has its options filled in.
    """
    from afina.diffusion.class_pictures import missing_pictures, write_class_pictures

    options = recipe.task
    if not options.get("class_prompt"):
        return
    folder, count = Path(options["class_folder"]).expanduser(), options["class_pictures"]
    missing = missing_pictures(folder, count)
    if not missing:
        return
    heading("Pictures of the class")
    if only_said:
        pairs({"to be made": f"{missing} of {count}, by the base; what follows is without them", "folder": folder})
        asked.task |= {"class_prompt": "", "class_folder": ""}
        return
    shows = sys.stderr.isatty()

    def tell(made: int) -> None:
        if shows:
            print(f"\r  {made} of {missing}", end="", file=sys.stderr, flush=True)

    made = write_class_pictures(
        recipe.model, options["class_prompt"], folder, count, steps=options["show_steps"], size=options["resolution"],
        weights=recipe.memory.weights, tell=tell,
    )  # fmt: skip
    if shows:
        print(file=sys.stderr)
    pairs({"made": f"{made} of {count}, by the base: {options['class_prompt']!r}", "folder": folder})
