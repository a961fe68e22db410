"""T27, T29, T42: what is dropped, repaired or refused, and that it is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from afina.data.clean import clean, normalised
from afina.data.table import Table
from afina.errors import DataError


def table(*rows):
    return Table(
        Path("rows.csv"),
        ["t", "l"],
        [dict(zip("tl", r, strict=True)) for r in rows],
        list(range(2, 2 + len(rows))),
        ",",
        "utf-8",
    )


GOOD = [(f"good {i}", "a") for i in range(3)] + [(f"bad {i}", "b") for i in range(3)]


def test_t42_rows_without_text_or_label_are_counted_and_never_kept():
    examples, report = clean(table(*GOOD, ("  ", "a"), ("x", ""), ("", "")), "t", "l")
    assert [e.text for e in examples] == [text for text, _ in GOOD]
    assert report.empty_texts == [8, 10]
    assert report.missing_labels == [9]
    assert (report.rows, report.kept) == (9, 6)
    assert "1 row dropped: the label is missing (line 9)" in report.lines()


def test_t27_exact_duplicates_are_kept_once():
    examples, report = clean(table(*GOOD, ("GOOD\u00a0 0 ", "a"), ("good 0", "a")), "t", "l")
    assert len(examples) == 6
    assert report.duplicates == [8, 9]
    assert len({normalised(e.text) for e in examples}) == len(examples)


def test_t27_a_text_under_two_labels_is_dropped_on_both_sides():
    examples, report = clean(table(*GOOD, ("same", "a"), ("Same", "b"), ("same ", "b")), "t", "l")
    assert report.conflicting_labels == [8, 9, 10]
    assert not any(normalised(e.text) == "same" for e in examples)


def test_t29_spellings_of_a_label_are_one_class():
    examples, report = clean(table(*GOOD, ("x", " A"), ("y", "A"), ("z", "a")), "t", "l")
    assert {e.label for e in examples} == {"a", "b"}
    assert report.repaired_labels == {"A": "a"}
    assert report.classes == {"a": 6, "b": 3}
    assert "label 'A' is read as 'a'" in report.lines()


def test_t29_a_small_class_is_named_with_its_lines():
    with pytest.raises(DataError, match=r"class 'c' has 2 rows \(line 8, 9\)"):
        clean(table(*GOOD, ("x", "c"), ("y", "c")), "t", "l")


def test_a_column_that_is_no_label():
    with pytest.raises(DataError, match="is this the label"):
        clean(table(*[(f"t{i}", f"id-{i}") for i in range(20)]), "t", "l")


def test_one_class_and_no_rows():
    with pytest.raises(DataError, match="'a' in every row"):
        clean(table(("x", "a"), ("y", "a")), "t", "l")
    with pytest.raises(DataError, match="no row with both"):
        clean(table(("", "a"), ("y", "")), "t", "l")
