"""What a recipe says of its data."""

from __future__ import annotations

import dataclasses

from afina.core.config import option

__all__ = ["DataOptions"]


@dataclasses.dataclass
class DataOptions:
    """Where the examples are."""

    file: str = option("", "file or folder of the rows: CSV, TSV, JSON, JSON Lines, Parquet")
    text: str = option("", "column of the text")
    label: str = option("", "column of the label or answer")
    text_pair: str = option("", "column of a second text, where the task has one")
    validation: float = option(0.1, "share of rows that choose the best epoch", low=0.01, high=0.5)
    test: float = option(0.2, "share of rows that are read once, at the end", low=0.01, high=0.5)
