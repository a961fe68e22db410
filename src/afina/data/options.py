"""What a recipe says of its data."""

from __future__ import annotations

import dataclasses

from afina.core.config import option

__all__ = ["CleanOptions", "DataOptions"]


@dataclasses.dataclass
class CleanOptions:
    """What is repaired and dropped before the rows are divided; each step is counted in the report."""

    empty: bool = option(True, "drop rows without a text or label; false: they are an error")
    duplicates: bool = option(True, "keep one of rows that are equal in all but case and white space")
    near_duplicates: str = option(
        "together", "nearly equal texts: on one side of the split, one of them kept, or left where chance puts them",
        choices=("together", "drop", "ignore"),
    )  # fmt: skip
    conflicts: bool = option(True, "drop texts that stand under different labels")
    label_spelling: bool = option(True, "labels that differ in case or white space alone are one class")


@dataclasses.dataclass
class DataOptions:
    """Where the examples are, and what is done with them."""

    file: str = option("", "file or folder of the rows: CSV, TSV, JSON, JSON Lines, Parquet")
    text: str = option("", "column of the text")
    label: str = option("", "column of the label or answer")
    text_pair: str = option("", "column of a second text, where the task has one")
    header: bool = option(True, "is the first row of a CSV its header; columns are called 1, 2, ... where it is not")
    new_tokens: list[str] = option(None, "words that become single tokens, with embeddings of their own", factory=list)
    validation: float = option(0.1, "share of rows that choose the best epoch", low=0.01, high=0.5)
    test: float = option(0.2, "share of rows that are read once, at the end", low=0.01, high=0.5)
    clean: CleanOptions = option(None, "steps of cleaning", factory=CleanOptions)
