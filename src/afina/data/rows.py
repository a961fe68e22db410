"""Rows kept column by column, and given as dictionaries one at a time.

A dictionary a row costs several times what stands in a row of a CSV; so kept, a cell costs its text and one pointer, and a
value that occurs again and again, such as a label, is kept once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

__all__ = ["Rows"]

_SHORT = 64  # letters of a value that may be kept once for all rows
_DISTINCT = 10_000  # such values a column


class Rows(Sequence[dict[str, str]]):
    """Rows by number; `rows[i]` is a new dictionary, so changing it changes nothing here."""

    def __init__(self, columns: Sequence[str], rows: Iterable[dict[str, str]] = ()):
        self.columns = list(columns)
        self._cells: list[list[str]] = [[] for _ in self.columns]
        self._known: list[dict[str, str]] = [{} for _ in self.columns]
        self._count = 0
        self += rows

    def append(self, values: Iterable[str]) -> None:
        """One more row, its values in the order of the columns."""
        for cells, known, value in zip(self._cells, self._known, values, strict=True):
            if len(value) <= _SHORT:
                same = known.get(value)
                if same is not None:
                    value = same
                elif len(known) < _DISTINCT:
                    known[value] = value
            cells.append(value)
        self._count += 1

    def add_column(self, name: str) -> None:
        """One more column, empty in the rows that are there."""
        self.columns.append(name)
        self._cells.append([""] * self._count)
        self._known.append({"": ""})

    def column(self, name: str) -> Sequence[str]:
        """All values of a column."""
        return self._cells[self.columns.index(name)]

    def put(self, name: str, values: Iterable[str]) -> None:
        """Other values for a column, one a row."""
        made = list(values)
        assert len(made) == self._count
        self._cells[self.columns.index(name)] = made

    def __iadd__(self, rows: Iterable[dict[str, str]]) -> Rows:
        for row in rows:
            self.append(row[name] for name in self.columns)
        return self

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> dict[str, str]: ...

    @overload
    def __getitem__(self, at: slice) -> list[dict[str, str]]: ...

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self._count))]
        return {name: cells[at] for name, cells in zip(self.columns, self._cells, strict=True)}

    def __iter__(self) -> Iterator[dict[str, str]]:
        if not self.columns:
            return iter([{}] * self._count)
        return (dict(zip(self.columns, values, strict=True)) for values in zip(*self._cells, strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]
