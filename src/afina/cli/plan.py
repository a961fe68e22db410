"""`afina plan`: what a recipe takes of memory, before anything is downloaded or loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afina.cli.assignments import assemble, typed_in
from afina.cli.show import console, fail, heading, pairs, quiet, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from afina.errors import Problems
    from afina.memory.footprint import Footprint
    from afina.training.planner import Planner
    from afina.training.recipe import Recipe
    from afina.training.within_limit import Choice

__all__ = ["plan", "planned", "show_choice", "show_footprint"]


def plan(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RECIPE.yaml [KEY=VALUE]...", help="A recipe, and what is to be changed in it.")
    ],
    memory: Annotated[
        str | None, typer.Option(help="Most memory of the device, as 11GB: the cheapest settings that fit are looked for.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; no GPU is needed for it (default: what is here)")] = None,
    processes: Annotated[int, typer.Option(help="Processes that share the work, a device each.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, all amounts in bytes.")] = False,
) -> None:
    """Say part by part what a run takes of memory, and with which settings it fits. No weights are needed.

    afina plan recipe.yaml --memory 11GB --device cuda
    """
    quiet()
    from afina.errors import Problems

    problems = Problems("afina plan")
    recipe = assemble({"memory": memory} if memory is not None else {}, arguments, problems)
    planned(recipe, device, processes, as_json, problems, typed_in(plan))


def planned(
    recipe: Recipe, device: str | None, processes: int, as_json: bool, problems: Problems, typed: Callable[[str], str],
) -> None:  # fmt: skip
    """Plan a recipe and show it; exits with 1 where it does not fit into its limit. `typed`: how keys are typed."""
    from afina.memory.devices import DEVICES
    from afina.training.plan import planner_for
    from afina.training.within_limit import within_limit

    device = device or _here()
    if device not in DEVICES:
        problems.add(f"--device {device}: expected {' or '.join(DEVICES)}")
    if processes < 1:
        problems.add(f"--processes {processes}: expected a number of at least 1")
    planner = planner_for(recipe, device, processes=processes, spell=typed, problems=problems)
    choice = within_limit(planner, recipe) if recipe.memory.limit is not None else None
    if recipe.training.gradient_accumulation == "auto":
        recipe.training.gradient_accumulation = 1
    footprint = planner.plan(recipe) if choice is None else choice.tried[0].footprint
    if as_json:
        print(json.dumps(_content(footprint, choice), indent=2))
        raise typer.Exit(0 if choice is None or choice.fits else 1)
    show_settings(recipe, planner)
    show_footprint(footprint, planner)
    if choice is not None:
        show_choice(choice)
        if not choice.fits:
            fail(choice.reason())
    elif device == "cpu":
        console().print("\nWith --memory 11GB, for example, the cheapest settings that fit are looked for.", markup=False)


def show_settings(recipe: Recipe, planner: Planner) -> None:
    """What the plan is of."""
    from afina.cli.preview import short

    options, where = recipe.training, "a CPU" if planner.device == "cpu" else "a GPU"
    method = " ".join(str(v) if k == "name" else f"{k}={v}" for k, v in short(recipe.method).items())
    heading(f"Memory on {where}" + (f", for each of {planner.processes} processes" if planner.processes > 1 else ""))
    pairs(
        {
            "base": f"{recipe.model}, weights in {recipe.memory.weights}",
            "method": method,
            "arithmetic": planner.precision,
            "a step": (f"{options.rows} rows" if not options.batch_tokens else f"up to {options.batch_tokens} tokens")
            + f" in {options.gradient_accumulation} part"
            + ("s" if options.gradient_accumulation != 1 else "")
            + (", blocks computed again in backward" if recipe.memory.gradient_checkpointing else "")
            + f", {options.optimizer}",
            "taken for granted": "\n".join(planner.notes),
        }
    )


def show_footprint(footprint: Footprint, planner: Planner) -> None:
    """Part by part, the moments side by side."""
    from afina.memory.footprint import titled
    from afina.memory.sizes import shown_size

    print()
    moments = footprint.moments
    names = list(dict.fromkeys(name for m in moments.values() for name in m.device))
    rows = [[titled(n), *(shown_size(m.device[n]) if m.device.get(n) else "" for m in moments.values())] for n in names]
    rows.append(["in all", *(shown_size(sum(m.device.values())) for m in moments.values())])
    titles = {"load": "loading", "train": "training", "evaluate": "evaluation"}
    columns = [titles[name] for name in moments]
    table(["", *columns], rows, right=columns)
    said = f"\n{shown_size(footprint.total)} at most, while {_WHILE[footprint.decisive]}"
    if footprint.host:
        moment = max(moments.values(), key=lambda m: sum(m.host.values()))
        parts = ", ".join(f"{titled(name)} {shown_size(size)}" for name, size in moment.host.items())
        said += f"; {shown_size(footprint.host)} of the host's memory ({parts})"
    console().print(f"{said}.", markup=False)
    if footprint.disk:
        console().print(f"{footprint.disk[0].upper()}{footprint.disk[1:]}.", markup=False)


_WHILE = {"load": "the model is loaded", "train": "a step is computed", "evaluate": "rows are read"}


def show_choice(choice: Choice) -> None:
    """Every try with its figure, and what was chosen."""
    from afina.memory.sizes import shown_size

    heading(f"Within {shown_size(choice.limit)}, a tenth of it left free")
    rows = [[t.added, t.rows, t.read, shown_size(t.footprint.total), "fits" if t.fits else "too much"] for t in choice.tried]
    table(["setting", "rows at once", "read at once", "takes", ""], rows, right=["rows at once", "read at once", "takes"])
    if not choice.fits:
        return
    if not choice.changed:
        console().print("\nThe recipe fits as it is.")
        return
    heading(f"Chosen: {shown_size(choice.footprint.total)}")
    for key, value in choice.changed.items():
        console().print(f"  {key}={str(value).lower() if isinstance(value, bool) else value}", markup=False)
    console().print("\n`afina train` with the same --memory, or memory.limit in the recipe, chooses them too.", markup=False)


def _content(footprint: Footprint, choice: Choice | None) -> dict[str, Any]:
    if choice is None:
        return footprint.to_dict()
    tried = [
        {"added": t.added, "rows": t.rows, "read": t.read, "bytes": t.footprint.total, "fits": t.fits} for t in choice.tried
    ]
    return {**footprint.to_dict(), "limit": choice.limit, "fits": choice.fits, "tried": tried,
            "chosen": {**choice.changed, "bytes": choice.footprint.total},
            **({} if choice.fits else {"reason": choice.reason()})}  # fmt: skip


def _here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
