"""T42: a column that is not there is named with its nearest; which columns are used is never left to chance."""

from __future__ import annotations

import dataclasses

import pytest
from rows_made import KIND, table, texts

from afina.data.columns import chosen_columns
from afina.data.example import Column
from afina.data.options import DataOptions
from afina.errors import Problems

ROWS = [(text, "ab"[i % 2]) for i, text in enumerate(texts(11))]
PAIR = dataclasses.replace(
    KIND, columns={**KIND.columns, "text_pair": Column("a second text", ("other",), required=False)}
)  # fmt: skip


def chosen(rows, kind=KIND, **options):
    problems = Problems("rows")
    return chosen_columns(rows, kind, DataOptions(**options), problems), problems.found


def test_t42_the_usual_names_are_taken_and_those_that_are_named_before_them():
    rows = table(ROWS, more={"other": ["x"] * 11, "class": ["y"] * 11})
    assert chosen(rows) == ({"text": "text", "label": "label"}, [])
    assert chosen(rows, PAIR)[0] == {"text": "text", "text_pair": "other", "label": "label"}
    assert chosen(rows, label="class")[0]["label"] == "class"
    rows.label = "other"
    assert chosen(rows)[0]["label"] == "other"
    options = DataOptions()
    chosen_columns(rows, KIND, options, Problems("rows"))
    assert (options.text, options.label) == ("text", "other")  # a recipe says what was used


@pytest.mark.parametrize("key", ["text", "label", "group", "time", "split_column"])
def test_t42_nearest_names(key):
    rows = table(ROWS, more={"customer": ["x"] * 11})
    _, said = chosen(rows, **{key: "customers"})
    assert any(problem.startswith(f"data.{key}: ") and "Did you mean 'customer'?" in problem for problem in said)


def test_t42_what_is_missing_and_what_is_said_twice():
    rows = table(ROWS)
    bare = dataclasses.replace(rows, columns=["words", "kind"], rows=[{"words": "x", "kind": "y"}] * 11)
    _, said = chosen(bare)
    assert said == [
        "data.text is missing: the text, one of words, kind",
        "data.label is missing: the class, one of words, kind",
    ]
    assert chosen(rows, text="label", label="label")[1] == ["data.text and data.label are both 'label'"]


def test_t42_lists_and_objects_are_no_text():
    rows = table(ROWS)
    rows.nested["text"] = "line 3, column 'text' is [1, 2]"
    assert chosen(rows)[1] == ["data.text: rows.csv, line 3, column 'text' is [1, 2]; expected a text"]
    lists = dataclasses.replace(KIND, columns={**KIND.columns, "text": Column("words", ("text",), structured=True)})
    assert chosen(rows, lists)[1] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "grouped"}, "data.group is missing"),
        ({"split": "time"}, "data.time is missing"),
        ({"split": "given"}, "data.split_column is missing"),
        ({"split": "stratified", "split_column": "label"}, "leave one of the two out"),
        ({"split": "stratified", "group": "label"}, "data.group=label does nothing"),
        ({"time": "label", "split_column": "label"}, "data.time=label does nothing"),
        ({"split_column": "label", "balance": "undersample_before_split"}, "say undersample"),
        ({"validation": 0.5, "test": 0.45}, "less than a tenth of the rows"),
    ],
)
def test_t42_ways_of_dividing_that_do_not_go_together(options, said):
    assert any(said in problem for problem in chosen(table(ROWS), **options)[1])


def test_t42_only_classes_are_balanced():
    numbers = dataclasses.replace(KIND, labels="number")
    assert "only rows with one class each can be balanced" in chosen(table(ROWS), numbers, balance="oversample")[1][0]


def test_t42_files_say_the_side_once():
    rows = table(ROWS, sides=["train"] * 11)
    assert "files already say which side" in chosen(rows, split_column="label")[1][0]
