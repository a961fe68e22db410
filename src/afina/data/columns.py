"""Which column of a table plays which role for a task."""

from __future__ import annotations

from collections.abc import Callable

from afina.data.example import Kind
from afina.data.options import DataOptions
from afina.data.table import Table
from afina.errors import Problems

__all__ = ["chosen_columns", "columns_of"]


def columns_of(table: Table, kind: Kind, options: DataOptions) -> dict[str, str]:
    """Role -> column: the one the recipe names, else the table's own, else the first usual name that is there; "" else."""
    chosen: dict[str, str] = {}
    for role, column in kind.columns.items():
        usual = [n for n in column.names if n in table.columns and n not in chosen.values()]
        chosen[role] = getattr(options, role) or getattr(table, role, "") or (usual[0] if usual else "")
    return chosen


def chosen_columns(
    table: Table, kind: Kind, options: DataOptions, problems: Problems, spell: Callable[[str], str] = str
) -> dict[str, str]:
    """Role -> column, of `columns_of`.

    What was chosen is put into `options`. A column that does not exist, one that is needed and not named, and one that
    plays two roles are added to `problems`.
    """
    chosen: dict[str, str] = {}
    named = columns_of(table, kind, options)
    for role, column in kind.columns.items():
        name = named[role]
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
    for key in ("group", "time", "split_column"):
        if (name := getattr(options, key)) and (missing := table.missing(name)):
            problems.add(f"{spell(f'data.{key}')}: {missing}")
    _check_division(table, kind, options, problems, spell)
    if kind.check is not None and not problems.found and (wrong := kind.check(chosen)):
        problems.add(f"{spell('data.label')} is missing: {wrong}; the columns are {', '.join(table.columns)}")
    return chosen


def _check_division(table: Table, kind: Kind, options: DataOptions, problems: Problems, spell: Callable[[str], str]) -> None:
    """Add ways of dividing and balancing that the rows do not allow, or that do not go together."""
    mode = options.mode(table.sides is not None)
    needed = {"grouped": options.group, "time": options.time, "given": options.split_column or table.sides}
    if mode in needed and not needed[mode]:
        cure = {
            "grouped": f"{spell('data.group')} is missing: the column of the group",
            "time": f"{spell('data.time')} is missing: the column of the time",
            "given": f"{spell('data.split_column')} is missing, or {spell('data.test_file')}, or a folder of such files",
        }
        problems.add(f"{spell('data.split')}={mode}: {cure[mode]}")
    if table.sides is not None and options.split_column:
        problems.add(f"{spell('data.split_column')}={options.split_column}: files already say which side a row is on")
    elif mode != "given" and (options.split_column or table.sides is not None):
        said = "files say" if table.sides is not None else f"{spell('data.split_column')} says"
        problems.add(f"{spell('data.split')}={mode}: {said} which side a row is on; leave one of the two out")
    if options.time and mode != "time":
        problems.add(f"{spell('data.time')}={options.time} does nothing where rows are divided otherwise (split={mode})")
    if options.group and mode == "stratified":
        problems.add(f"{spell('data.group')}={options.group} does nothing with {spell('data.split')}=stratified")
    if options.validation + options.test > 0.9:
        shares = f"{spell('data.validation')}={options.validation} and {spell('data.test')}={options.test}"
        problems.add(f"{shares} leave less than a tenth of the rows to train")
    if options.balance != "none" and kind.labels != "class":
        problems.add(f"{spell('data.balance')}={options.balance}: only rows with one class each can be balanced")
    elif options.balance == "undersample_before_split" and mode == "given":
        problems.add(f"{spell('data.balance')}={options.balance}: sides that are given stay as they are; say undersample")
