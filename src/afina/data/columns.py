"""Which column of a table plays which role for a task."""

from __future__ import annotations

from collections.abc import Callable

from afina.data.example import Kind
from afina.data.options import DataOptions
from afina.data.table import Table
from afina.errors import Problems

__all__ = ["chosen_columns"]


def chosen_columns(
    table: Table, kind: Kind, options: DataOptions, problems: Problems, spell: Callable[[str], str] = str
) -> dict[str, str]:
    """Role -> column: the one the recipe names, else the table's own, else the first usual name that is there.

    What was chosen is put into `options`. A column that does not exist, one that is needed and not named, and one that
    plays two roles are added to `problems`.
    """
    chosen: dict[str, str] = {}
    for role, column in kind.columns.items():
        name = getattr(options, role) or getattr(table, role, "")
        usual = [n for n in column.names if n in table.columns and n not in chosen.values()]
        name = name or (usual[0] if usual else "")
        setattr(options, role, name)
        if not name:
            if column.required:
                problems.add(f"{spell(f'data.{role}')} is missing: {column.help}, one of {', '.join(table.columns)}")
        elif missing := table.missing(name):
            problems.add(f"{spell(f'data.{role}')}: {missing}")
        elif name in chosen.values():
            other = next(r for r, n in chosen.items() if n == name)
            problems.add(f"{spell(f'data.{other}')} and {spell(f'data.{role}')} are both {name!r}")
        elif name in table.nested and not column.structured:
            problems.add(f"{spell(f'data.{role}')}: {table.path}, {table.nested[name]}; expected a text")
        else:
            chosen[role] = name
    if kind.check is not None and not problems.found and (wrong := kind.check(chosen)):
        problems.add(f"{spell('data.label')} is missing: {wrong}; the columns are {', '.join(table.columns)}")
    return chosen
