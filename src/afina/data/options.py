"""What a recipe says of its data."""

from __future__ import annotations

import dataclasses

from afina.core.config import option

__all__ = ["BALANCES", "DELIMITERS", "MODES", "CleanOptions", "DataOptions"]

MODES = ("auto", "stratified", "grouped", "time", "given")
BALANCES = ("none", "undersample", "oversample", "class_weights", "undersample_before_split")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}


@dataclasses.dataclass
class CleanOptions:
    """What is repaired and dropped before the rows are divided; each step is counted in the report."""

    unicode: bool = option(True, "repair letters that were read in a wrong encoding (mojibake), and drop control characters")
    white_space: bool = option(False, "make every run of white space one space")
    empty: bool = option(True, "drop rows without a text or label; false: they are an error")
    broken_files: bool = option(False, "leave out rows whose picture or recording cannot be read; false: they are an error")
    min_letters: int = option(0, "drop texts with fewer letters and digits than this", low=0)
    duplicates: bool = option(True, "keep one of rows that are equal in all but case and white space")
    near_duplicates: str = option(
        "together", "nearly equal texts: on one side of the split, one of them kept, or left where chance puts them",
        choices=("together", "drop", "ignore"),
    )  # fmt: skip
    near_share: float = option(0.8, "share of five-letter pieces that makes two texts nearly equal", low=0.5, high=1.0)
    conflicts: bool = option(True, "drop texts that stand under different labels")
    label_spelling: bool = option(True, "labels that differ in case or white space alone are one class")
    suspects: bool = option(True, "list rows whose label may be wrong; none of them is dropped")


@dataclasses.dataclass
class DataOptions:
    """Where the examples are, and what is done with them."""

    file: str = option("", "file or folder of the rows, or a data set of the hub (hub:NAME, hub:NAME:CONFIGURATION)")
    text: str = option("", "column of the text")
    image: str = option("", "column of the paths of pictures, relative to the file")
    audio: str = option("", "column of the paths of recordings, relative to the file")
    label: str = option("", "column of the label or answer")
    text_pair: str = option("", "column of a second text, where the task has one")
    negatives: str = option("", "column of wrong passages, where the task has them")
    boxes: str = option("", "column of the boxes of words on a page, where the task has them")
    page_size: str = option("", "column of the width and height of a page in pixels, where no picture of it tells")
    validation_file: str = option("", "file of the rows that choose the best epoch, where it is one of its own")
    test_file: str = option("", "file of the rows that are read once, at the end, where it is one of its own")
    header: bool = option(True, "is the first row of a CSV its header; columns are called 1, 2, ... where it is not")
    delimiter: str = option("", "between the fields of a CSV; found out where nothing is said", choices=("", *DELIMITERS))
    encoding: str = option("", "of a text file, for example utf-8 or windows-1252; found out where nothing is said")
    new_tokens: list[str] = option(None, "words that become single tokens, with embeddings of their own", factory=list)
    split: str = option(
        "auto", "how rows are divided; auto: as files or a column say, by time, by group, else by chance within each class",
        choices=MODES,
    )  # fmt: skip
    group: str = option("", "column whose rows of one value stay on one side, such as the customer")
    time: str = option("", "column of dates or numbers: the earliest rows train, the latest test")
    split_column: str = option("", "column that says train, validation or test")
    validation: float = option(0.1, "share of rows that choose the best epoch", low=0.01, high=0.5)
    test: float = option(0.2, "share of rows that are read once, at the end", low=0.01, high=0.5)
    balance: str = option(
        "none", "of classes, in the training rows alone; undersample_before_split takes as many rows of each class before "
        "rows are divided, so that the test rows are balanced too", choices=BALANCES,
    )  # fmt: skip
    clean: CleanOptions = option(None, "steps of cleaning", factory=CleanOptions)

    def mode(self, sides: bool) -> str:
        """How rows are divided; `sides`: files say which side a row is on."""
        if self.split != "auto":
            return self.split
        if sides or self.split_column:
            return "given"
        return "time" if self.time else "grouped" if self.group else "stratified"
