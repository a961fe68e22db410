"""Reads the rows that a recipe's data section names: one file or folder, or one for each side, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from afina.data.columns import columns_of
from afina.data.example import ROLES, Kind
from afina.data.hub import is_hub, read_hub
from afina.data.media import locate
from afina.data.options import DELIMITERS, DataOptions
from afina.data.read import SPLITS, join_sides, read_table
from afina.data.table import Form, Table
from afina.errors import DataError

__all__ = ["read_rows"]


def read_rows(options: DataOptions, kind: Kind) -> Table:
    """The table of `data.file`, with those of `data.validation_file` and `data.test_file`.

    Raises DataError with all that cannot be read, MissingDependencyError where a library is lacking.
    """
    delimiter = options.delimiter if options.delimiter in DELIMITERS else ""  # any other is told when options are checked
    form = Form(header=options.header, delimiter=delimiter, encoding=options.encoding)
    named = [*(getattr(options, role) for role in ROLES), options.group, options.time, options.split_column]
    wanted = set(named) - {""}

    def read(place: str) -> Table:
        if is_hub(place):
            return read_hub(place)
        table = read_table(place, wanted, form=form, read=kind.read, media=kind.media)
        locate(table, (columns_of(table, kind, options)[role] for role in kind.media))
        return table

    files = {"train": options.file, "validation": options.validation_file, "test": options.test_file}
    tables = {side: read(place) for side, place in files.items() if place}
    if set(tables) == {"train"}:
        return tables["train"]
    _check_apart(files, tables)
    names = _names({side: files[side] for side in tables})
    joined = join_sides(Path(options.file), tables, names, wanted)
    first = tables["train"]
    return replace(joined, **{role: getattr(first, role) for role in ROLES})


def _check_apart(files: Mapping[str, str], tables: Mapping[str, Table]) -> None:
    for side, table in tables.items():
        if table.sides is not None:
            key = "file" if side == "train" else f"{side}_file"
            raise DataError(f"data.{key}: {files[side]} holds train and test rows itself, so it is not one side alone")
    places = [str(Path(files[side]).resolve()) for side in tables]
    if len(set(places)) < len(places):
        raise DataError("data.file, data.validation_file and data.test_file must be different files")


def _names(files: Mapping[str, str]) -> dict[str, str]:
    """Short names that tell the files apart: their own, else the side before it."""
    names = {side: Path(place).name for side, place in files.items()}
    if len(set(names.values())) < len(names):
        names = {side: f"{side}/{name}" for side, name in names.items()}
    return {side: names[side] for side in SPLITS if side in names}
