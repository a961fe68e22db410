"""`afina tasks`: what a row may mean, and the options of one task."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from afina.cli.assignments import typed_as
from afina.cli.show import console, heading, pairs, quiet, table

__all__ = ["tasks"]


def tasks(name: Annotated[str | None, typer.Argument(help="A task, to see its columns and options.")] = None) -> None:
    """List the tasks: their columns and figures. With a name: what each column holds, and the options."""
    quiet()
    from afina.tasks.catalogue import find_task
    from afina.tasks.catalogue import tasks as found

    if name is None:
        rows = [[t.name, columns_of(t), ", ".join(f.title for f in t.figures.values())] for t in found().values()]
        table(["task", "columns", "figures"], rows)
        if console().is_terminal:
            console().print("\nColumns and options of one: afina tasks NAME")
        return
    task = find_task(name)
    heading(task.name)
    pairs({"is": (task.__doc__ or "").strip().splitlines()[0], "figures": ", ".join(f.title for f in task.figures.values())})
    heading("Columns")
    rows = [
        [typed_as(f"data.{role}"), column.help, ", ".join(column.names), "" if column.required else "may be left out"]
        for role, column in task.kind.columns.items()
    ]
    table(["option", "holds", "found by the name", ""], rows)
    fields = dataclasses.fields(task.Options)
    if fields:
        heading("Options (task.KEY=VALUE)")
        table(["option", "default", "meaning"], [[f.name, str(f.default), meaning(f)] for f in fields])


def columns_of(task: Any) -> str:
    """The roles, those that may be left out in brackets."""
    return ", ".join(
        (role if column.required else f"({role})").replace("_", "-") for role, column in task.kind.columns.items()
    )


def meaning(field: Any) -> str:
    """Help and choices of an option."""
    choices = field.metadata.get("choices")
    return str(field.metadata.get("help", "")) + (f" ({', '.join(map(str, choices))})" if choices else "")
