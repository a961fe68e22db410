"""T28: classes are made alike among the training rows, never before the split unless that is asked for by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from rows_made import cut, table, texts

from afina.data.balance import oversampled
from afina.data.read import read_table

SMS = Path(__file__).parents[3] / "shared" / "data" / "sms_spam" / "SMSSpamCollection"
ROWS = table([(text, "rare" if i % 11 == 0 else "often" if i % 3 else "some") for i, text in enumerate(texts(307))])
PLAIN = cut(ROWS)


def counts(done, side):
    return Counter(done.examples[i].label for i in done.sides[side])


@pytest.mark.parametrize("balance", ["undersample", "oversample", "class_weights"])
def test_t28_validation_and_test_are_as_without_balancing(balance):
    done = cut(ROWS, balance=balance)
    for side in ("validation", "test"):
        assert done.sides[side] == PLAIN.sides[side]
    assert set(done.sides["train"]) <= set(PLAIN.sides["train"])
    for balanced in (done, cut(ROWS, balance=balance)):
        assert balanced.sides == done.sides


def test_t28_undersampled_train_has_as_many_of_each_and_lists_the_others():
    done, least = cut(ROWS, balance="undersample"), min(counts(PLAIN, "train").values())
    assert set(counts(done, "train").values()) == {least}
    assert len(done.left_out) == len(PLAIN.sides["train"]) - 3 * least
    assert len(set(done.sides["train"])) == 3 * least


def test_t28_oversampled_train_has_every_row_and_repeats_evenly():
    done, most = cut(ROWS, balance="oversample"), max(counts(PLAIN, "train").values())
    assert set(counts(done, "train").values()) == {most}
    assert set(done.sides["train"]) == set(PLAIN.sides["train"])
    assert done.repeated == 3 * most - len(PLAIN.sides["train"])
    times = Counter(done.sides["train"])
    for label in ("rare", "often", "some"):
        own = {times[i] for i in times if done.examples[i].label == label}
        assert max(own) - min(own) <= 1
    assert oversampled({1: "a", 2: "a", 5: "b"}, seed=0) == [1, 2, 5, 5]


def test_t28_weights_make_classes_weigh_alike_and_rows_one():
    done = cut(ROWS, balance="class_weights")
    assert done.sides == PLAIN.sides
    train = counts(done, "train")
    assert {label: train[label] * weight for label, weight in done.weights.items()} == pytest.approx(
        dict.fromkeys(train, len(done.sides["train"]) / 3)
    )
    assert done.report()["class_weights"] == done.weights


def test_t28_before_the_split_by_name_and_said():
    done = cut(ROWS, balance="undersample_before_split")
    for side in done.sides:
        sizes = counts(done, side).values()
        assert max(sizes) - min(sizes) <= 1
    assert any("'rare'" in note and "will be lower than the test figures say" in note for note in done.notes)
    assert len(done.left_out) + len(done.examples) == 307


@pytest.mark.skipif(not SMS.is_file(), reason="../shared/data/sms_spam is absent")
def test_t28_the_spam_recipe_of_the_book_has_its_numbers():
    from rows_made import KIND

    from afina.data.divide import divided
    from afina.data.options import CleanOptions, DataOptions

    rows = read_table(SMS, {"1", "2"})
    assert len(rows.rows) == 5574
    asis = CleanOptions(duplicates=False, near_duplicates="ignore", conflicts=False)
    options = DataOptions(balance="undersample_before_split", clean=asis)
    done = divided(rows, KIND, options, columns={"text": "2", "label": "1"}, seed=123)
    assert done.cleaned.classes == {"ham": 747, "spam": 747}
    assert [len(done.sides[side]) for side in ("train", "validation", "test")] == [1045, 149, 300]
    assert len(done.left_out) == 4827 - 747
