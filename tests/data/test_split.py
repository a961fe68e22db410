"""Laws of the split: nothing lost, nothing twice, every class on every side, the same for the same seed."""

from __future__ import annotations

import random

import pytest

from afina.data.split import stratified


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
    train, validation, test = stratified(labels, seed=1)
    assert (len(train), len(validation), len(test)) == (700, 100, 200)
    assert sum(labels[i] == "b" for i in test) == 60
    assert stratified(labels, seed=2)[2] != test


def test_a_class_too_small():
    with pytest.raises(ValueError, match="'b' has 2 rows"):
        stratified(["a"] * 5 + ["b"] * 2)
