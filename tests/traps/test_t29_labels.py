"""T29: labels that differ in spelling alone are no classes of their own; a class with one row breaks a split."""

from __future__ import annotations

import pytest
from rows_made import cut, table, texts

from afina.errors import DataError


def test_t29_case_and_white_space_make_no_class():
    spellings = ["spam", "Spam", " spam", "SPAM ", "ham", "Ham"]
    rows = [(text, spellings[i % 6] if i > 20 else spellings[i % 2 * 4]) for i, text in enumerate(texts(101))]
    done = cut(table(rows))
    assert set(done.cleaned.classes) == {"spam", "ham"}
    assert done.cleaned.repaired_labels == {"Spam": "spam", "SPAM": "spam", "Ham": "ham"}
    assert sum(done.cleaned.classes.values()) == 101
    assert all(example.row["label"] == example.label for example in done.examples)
    assert "label 'SPAM' is read as 'spam'" in done.lines()


def test_t29_every_class_is_on_every_side_or_it_is_an_error():
    rows = [(text, "abc"[i % 2 if i > 8 else 2]) for i, text in enumerate(texts(97))]
    for seed in range(7):
        done = cut(table(rows), seed=seed)
        for chosen in done.sides.values():
            assert {done.examples[i].label for i in chosen} == {"a", "b", "c"}
    with pytest.raises(DataError, match=r"class 'c' has 2 rows \(line 2, 3\)") as error:
        cut(table([*rows[:2], *rows[9:]]))
    assert "Add rows, or rename or remove the class" in str(error.value)


def test_t29_a_class_of_one_text_said_three_times():
    rows = [(text, "ab"[i % 2]) for i, text in enumerate(texts(41))]
    text = texts(1, seed=9)[0]
    nearly = [(text, "c"), (f"{text}.", "c"), (f"{text}!", "c")]
    with pytest.raises(DataError, match="class 'c' has too few different texts for a row of it in"):
        cut(table(rows + nearly))


def test_t29_a_class_that_train_lacks():
    rows = [(text, "ab"[i % 2]) for i, text in enumerate(texts(43))]
    sides = ["train"] * 30 + ["validation"] * 5 + ["test"] * 8
    with pytest.raises(DataError, match="train has no row of the class 'c'"):
        cut(table([*rows[:-1], (rows[-1][0], "c")], sides=sides))
