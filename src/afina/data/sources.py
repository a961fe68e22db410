"""Reads the rows that a recipe's data section names."""

from __future__ import annotations

from afina.data.example import Kind
from afina.data.options import DataOptions
from afina.data.read import read_table
from afina.data.table import Table

__all__ = ["read_rows"]


def read_rows(options: DataOptions, kind: Kind) -> Table:
    """The table of `data.file`. Raises DataError with all that cannot be read."""
    wanted = {getattr(options, role) for role in kind.columns} - {""}
    return read_table(options.file, wanted, header=options.header, read=kind.read)
