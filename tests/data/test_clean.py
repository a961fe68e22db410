"""T27, T29, T42: what is dropped, repaired or refused, and that it is counted."""

from __future__ import annotations

import pytest
from tables import cut, kind, table

from afina.data.clean import normalised
from afina.data.example import Example
from afina.errors import DataError

WORDS = ["stone", "river", "candle", "ladder", "winter", "meadow", "copper", "violin"]
GOOD = [(f"{word} good", "a") for word in WORDS[:4]] + [(f"{word} bad", "b") for word in WORDS[4:]]


def test_t42_rows_without_text_or_label_are_counted_and_never_kept():
    done = cut(table(*GOOD, ("  ", "a"), ("x", ""), ("", "")))
    assert [e.text for e in done.examples] == [text for text, _ in GOOD]
    assert done.cleaned.empty_texts == [10, 12]
    assert done.cleaned.missing_labels == [11]
    assert (done.cleaned.rows, done.cleaned.kept) == (11, 8)
    assert "1 row dropped: the label is missing (line 11)" in done.cleaned.lines()


def test_t42_empty_rows_are_an_error_where_that_is_asked_for():
    with pytest.raises(DataError, match=r"1 row has no text \(line 10\)") as error:
        cut(table(*GOOD, ("  ", "a"), ("x", "")), clean={"empty": False})
    assert "1 row has no label (line 11)" in str(error.value)
    assert "data.clean.empty=true" in str(error.value)


def test_t27_exact_duplicates_are_kept_once():
    done = cut(table(*GOOD, ("STONE\u00a0 good ", "a"), ("stone good", "a")))
    assert len(done.examples) == 8
    assert done.cleaned.duplicates == [10, 11]
    assert len({normalised(e.text) for e in done.examples}) == len(done.examples)


def test_t27_a_text_under_two_labels_is_dropped_on_both_sides():
    done = cut(table(*GOOD, ("same", "a"), ("Same", "b"), ("same ", "b")))
    assert done.cleaned.conflicting_labels == [10, 11, 12]
    assert not any(normalised(e.text) == "same" for e in done.examples)


def test_t29_spellings_of_a_label_are_one_class():
    done = cut(table(*GOOD, ("x", " A"), ("y", "A"), ("z", "a")))
    assert {e.label for e in done.examples} == {e.row["label"] for e in done.examples} == {"a", "b"}
    assert done.cleaned.repaired_labels == {"A": "a"}
    assert done.cleaned.classes == {"a": 7, "b": 4}
    assert "label 'A' is read as 'a'" in done.cleaned.lines()
    apart = cut(table(*GOOD, *[(f"{word} more", "A") for word in WORDS]), clean={"label_spelling": False})
    assert apart.cleaned.classes == {"A": 8, "a": 4, "b": 4}


def test_t29_a_small_class_is_named_with_its_lines():
    with pytest.raises(DataError, match=r"class 'c' has 2 rows \(line 10, 11\)"):
        cut(table(*GOOD, ("x", "c"), ("y", "c")))


def test_a_column_that_is_no_label():
    with pytest.raises(DataError, match="is this the label"):
        cut(table(*[(f"t{i}", f"id-{i}") for i in range(20)]))


def test_one_class_and_no_rows():
    with pytest.raises(DataError, match="'a' in every row"):
        cut(table(("x", "a"), ("y", "a")))
    with pytest.raises(DataError, match="no row with both"):
        cut(table(("", "a"), ("y", "")))
    with pytest.raises(DataError, match="no row with a text"):
        cut(table(("",), (" ",), columns="t"), "none")


def test_several_labels_are_compared_as_sets_and_spelled_alike():
    rows = [(f"{word} {n}", "News, sport" if n == 1 else "news") for n in range(3) for word in WORDS]
    more = [("twice", "news, sport"), ("twice", "sport,news"), ("none", "[]"), ("other", "a"), ("other", "b")]
    done = cut(table(*rows, *more), "classes")
    assert done.cleaned.duplicates == [27]
    assert done.cleaned.conflicting_labels == [29, 30]
    assert set(done.cleaned.classes) == {"news", "sport"}
    assert done.cleaned.repaired_labels == {"News": "news"}
    assert {e.label for e in done.examples} == {"news", "news, sport", "[]"}


def test_several_right_answers_stay_on_one_side():
    rows = [(f"say {word}", f"{answer} {word}") for word in WORDS * 2 for answer in ("yes", "no")]
    for seed in range(5):
        done = cut(table(*rows), "text", seed=seed)
        assert len(done.examples) == 16
        assert len(done.cleaned.duplicates) == 16
        assert not done.cleaned.classes
        sides = {(done.examples[i].text, side) for side, chosen in done.sides.items() for i in chosen}
        assert len(sides) == 8


def test_texts_alone():
    done = cut(table(*[(word,) for word in WORDS * 2], columns="t"), "none")
    assert [e.text for e in done.examples] == WORDS
    assert sorted(i for rows in done.sides.values() for i in rows) == list(range(8))


def test_numbers_are_spread_over_all_sides():
    rows = [(f"{word} number {i}", str(i * i)) for i in range(20) for word in WORDS]
    done = cut(table(*rows), "number")
    for chosen in done.sides.values():
        numbers = [float(done.examples[i].label) for i in chosen]
        assert min(numbers) < 40 < 250 < max(numbers)


def test_every_row_that_the_task_refuses_is_told_at_once():
    def make(row, line):
        if not row.get("label", "x").isdigit():
            raise ValueError(f"the label is {row['label']!r}; expected a number")
        return Example(row["text"], row["label"], line)

    rows = [(f"{word} {n}", str(n) if n else "many") for n in range(4) for word in WORDS]
    with pytest.raises(DataError, match="line 2: the label is 'many'; expected a number") as error:
        cut(table(*rows, ("", "no number")), of=kind("number", make))
    assert "line 6" in str(error.value)
    assert "line 7" not in str(error.value)
    assert "3 more rows are like that" in str(error.value)


def test_examples_of_one_group_are_on_one_side_and_know_their_row():
    def make(row, line):
        return Example(row["text"], row["label"], line, group=row["text"].split()[0])

    rows = [(f" {word} {'abcdefgh'[n] * 9}", "xy"[n % 2]) for word in WORDS for n in range(7)]
    for seed in range(5):
        done = cut(table(*rows), of=kind("class", make), seed=seed)
        sides = {(done.examples[i].group, side) for side, chosen in done.sides.items() for i in chosen}
        assert len(sides) == len(WORDS)
        assert all(done.sides.values())
        for example, row in zip(done.examples, done.rows, strict=True):
            assert example.row == {"text": rows[row][0].strip(), "label": rows[row][1]}
            assert example.line == row + 2
