"""`afina check`: all that a recipe's run would do, and nothing of it done."""

from __future__ import annotations

from typing import Annotated

import typer

from afina.cli.assignments import assemble
from afina.cli.preview import show_plan
from afina.cli.show import console, quiet

__all__ = ["check"]


def check(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RECIPE.yaml [KEY=VALUE]...", help="A recipe, and what is to be changed in it.")
    ],
) -> None:
    """Show what a recipe would do: rows, splits, an example as the model sees it, layers, steps. Writes nothing.

    afina check recipe.yaml training.epochs=3
    """
    quiet()
    from afina.errors import Problems
    from afina.training.run import prepare

    problems = Problems("afina check")
    run = prepare(assemble({}, arguments, problems), None, problems=problems, trial=True)
    show_plan(run)
    console().print("\nNothing was trained or written.")
