"""`afina methods`: the catalogue, and the options of one method."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from afina.cli.show import console, heading, pairs, table

__all__ = ["methods"]


def methods(name: Annotated[str | None, typer.Argument(help="A method, to see its options.")] = None) -> None:
    """List the methods: what each trains, whether it merges, its cost, its paper. With a name: its options."""
    from afina.core.registry import get_method
    from afina.core.registry import methods as registered

    if name is None:
        start = "https://" if console().is_terminal else ""  # leaves room; `afina methods NAME` has the whole address
        rows = [[m.name, m.trains, merges(m), m.cost, m.paper.removeprefix(start)] for m in registered().values()]
        table(["method", "trains", "merges", "cost", "paper"], rows)
        if console().is_terminal:
            console().print("\nOptions of one: afina methods NAME")
        return
    method = get_method(name)
    heading(method.name)
    means = " ".join(f"{key}={value}" for key, value in method.options.items())
    about = {"trains": method.trains, "merges": merges(method), "cost": method.cost, "paper": method.paper}
    pairs({**about, "in Python": f"afina.{method.config.__name__}({means.replace(' ', ', ')})"})
    heading("Options (key=value)")
    table(["option", "default", "meaning"], options_of(method))


def merges(method: Any) -> str:
    """Whether the method can be merged into the base's weights."""
    return "yes" if method.kind == "layer" and method.adapter.mergeable else "no"


def options_of(method: Any) -> list[list[str]]:
    """Name, default and meaning of every option a person might set."""
    from afina.training.recipe import METHOD_DEFAULTS, NOT_IN_RECIPES

    rows = []
    for field in dataclasses.fields(method.config):
        if field.name in NOT_IN_RECIPES or field.name in method.options:
            continue
        factory: Any = field.default_factory
        default = field.default if field.default is not dataclasses.MISSING else factory()
        default = METHOD_DEFAULTS.get(method.name, {}).get(field.name, default)
        choices = field.metadata.get("choices")
        meaning = field.metadata.get("help", "") + (f" ({', '.join(map(str, choices))})" if choices else "")
        rows.append([field.name, str(getattr(default, "value", default)), meaning])
    return rows
