"""Laws of the split: nothing lost, nothing twice, every class on every side, the same for the same seed."""

from __future__ import annotations

import random

import pytest

from afina.data.split import shares_of, stratified


@pytest.mark.parametrize("sizes", [(3, 3), (3, 101), (17, 5, 29), (4, 4, 4, 4, 997)])
@pytest.mark.parametrize("shares", [(0.1, 0.2), (0.01, 0.01), (0.5, 0.5)])
def test_split_laws(sizes, shares):
    labels = [f"class {i}" for i, n in enumerate(sizes) for _ in range(n)]
    random.Random(1).shuffle(labels)
    sides = stratified(labels, validation=shares[0], test=shares[1], seed=3)
    assert sorted(i for side in sides for i in side) == list(range(len(labels)))
    for side in sides:
        assert {labels[i] for i in side} == set(labels)
        assert side == sorted(side)
    assert sides == stratified(labels, validation=shares[0], test=shares[1], seed=3)


def test_shares_and_seed():
    labels = ["a"] * 700 + ["b"] * 300
    train, validation, test = stratified(labels, validation=0.1, test=0.2, seed=1)
    assert (len(train), len(validation), len(test)) == (700, 100, 200)
    assert sum(labels[i] == "b" for i in test) == 60
    assert stratified(labels, validation=0.1, test=0.2, seed=2)[2] != test


@pytest.mark.parametrize("rows", [10, 101, 997, 1494])
@pytest.mark.parametrize("classes", [1, 2, 7])
def test_shares_hold_over_all_and_in_each_class(rows, classes):
    labels = [str(i % classes) for i in range(rows)]
    sides = stratified(labels, validation=0.1, test=0.2, seed=5)
    if rows > 10 * classes:
        assert tuple(map(len, sides)) == shares_of(rows, 0.1, 0.2)
        for side, share in zip(sides, (0.7, 0.1, 0.2), strict=True):
            for name in set(labels):
                assert sum(labels[i] == name for i in side) == pytest.approx(share * labels.count(name), abs=2)


def test_the_shares_of_a_known_book():
    assert shares_of(1494, 0.1, 0.2) == (1045, 149, 300)
    assert shares_of(7, 0.5, 0.0) == (3, 4, 0)


def test_small_classes_go_to_train_first():
    train, validation, test = stratified(["a"] * 20 + ["b"] + ["c"] * 2, validation=0.1, test=0.2, seed=1)
    assert 20 in train
    assert {21, 22} <= {*train, *validation}
    assert not {20, 21, 22} & set(test)


def test_groups_stay_whole_and_shares_nearly_hold():
    chance = random.Random(2)
    labels = chance.choices("ab", weights=(9, 1), k=499)
    order = chance.sample(range(499), 499)
    groups = [order[i : i + 1 + i % 7] for i in range(0, 490, 7)]
    for seed in range(7):
        sides = stratified(labels, validation=0.1, test=0.2, seed=seed, groups=groups)
        assert sorted(i for side in sides for i in side) == list(range(499))
        for group in groups:
            assert sum(bool(set(group) & set(side)) for side in sides) == 1
        assert len(sides[2]) == pytest.approx(100, abs=12)
        assert len(sides[1]) == pytest.approx(50, abs=12)
