"""Laws of the batches: every row once, none too large, rows of like length together, the order from seed and epoch alone."""

from __future__ import annotations

import random

import pytest

from afina.training.batching import parts, shuffled_batches, sorted_batches, stretches
from afina.training.optimizers import SCHEDULES, schedule_factor
from afina.training.recipe import TrainingOptions


@pytest.mark.parametrize("rows", [1, 7, 16, 257, 1009])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_every_row_once(rows, size):
    lengths = [random.Random(i).randrange(1, 97) for i in range(rows)]
    for batches in (shuffled_batches(lengths, size, seed=0, epoch=1), sorted_batches(lengths, size)):
        assert sorted(i for batch in batches for i in batch) == list(range(rows))
        assert max(map(len, batches)) <= size
        assert len(batches) == -(-rows // size)


def test_less_padding_than_by_chance_and_another_order_each_epoch():
    lengths = [random.Random(i).randrange(1, 97) for i in range(1009)]

    def padded(batches):
        return sum(len(b) * max(lengths[i] for i in b) for b in batches)

    bucketed = shuffled_batches(lengths, 16, seed=0, epoch=1)
    order = random.Random(0).sample(range(1009), 1009)
    assert padded(bucketed) < 0.75 * padded([order[i : i + 16] for i in range(0, 1009, 16)])
    assert bucketed == shuffled_batches(lengths, 16, seed=0, epoch=1)
    assert bucketed != shuffled_batches(lengths, 16, seed=0, epoch=2)
    assert bucketed != shuffled_batches(lengths, 16, seed=1, epoch=1)


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (2, 5), (0, 2), (16, 4)])
def test_parts_cover_the_batch(rows, count):
    made = parts(list(range(rows)), count)
    assert len(made) == count
    assert sorted(i for part in made for i in part) == list(range(rows))
    assert max(map(len, made)) - min(map(len, made)) <= 1


@pytest.mark.parametrize("steps", [1, 2, 7, 200])
@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_is_never_zero_within_the_run_and_falls_after_its_peak(name, steps):
    values = [schedule_factor(name, steps, 0.1, i) for i in range(steps + 1)]
    assert all(0 < v <= 1 for v in values[:-1])
    assert max(values) == 1.0
    peak = values.index(1.0)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[-1] == 1.0 if name == "constant" else values[-1] <= 1 / steps


def lengths_of(rows):
    return [random.Random(i).randrange(1, 97) for i in range(rows)]


@pytest.mark.parametrize("rows", [1, 7, 257, 1009])
@pytest.mark.parametrize("tokens", [96, 211, 4099])
def test_batches_of_tokens_are_within_them_and_as_many_in_each_epoch(rows, tokens):
    lengths, counts = lengths_of(rows), set()
    for epoch in (1, 2, 3):
        batches = shuffled_batches(lengths, 16, seed=5, epoch=epoch, tokens=tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(rows))
        assert max(len(b) * max(lengths[i] for i in b) for b in batches) <= tokens
        counts.add(len(batches))
    assert len(counts) == 1
    if rows == 1009:
        assert batches != shuffled_batches(lengths, 16, seed=5, epoch=2, tokens=tokens)
        assert batches == shuffled_batches(lengths, 16, seed=5, epoch=3, tokens=tokens)
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        assert padded < 1.15 * sum(lengths)


def test_reading_takes_more_rows_where_they_are_short():
    lengths = lengths_of(1009)
    fixed, filled = sorted_batches(lengths, 16), sorted_batches(lengths, 16, tokens=16 * 96)
    assert sorted(i for batch in filled for i in batch) == list(range(1009))
    assert len(filled) < 0.7 * len(fixed)
    assert max(len(b) * lengths[b[0]] for b in filled) <= 16 * 96
    assert all(len(b) >= 16 for b in filled[:-1])
    assert sorted_batches(lengths, 16, tokens=16) == fixed


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (2, 5), (0, 2), (16, 4)])
def test_stretches_are_of_neighbours(rows, count):
    made = stretches(list(range(rows)), count)
    assert [i for part in made for i in part] == list(range(rows))
    assert len(made) == count
    assert max(map(len, made)) - min(map(len, made)) <= 1


@pytest.mark.parametrize("longest", [53, 96])
@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
@pytest.mark.parametrize("tokens", [96, 211, 997])
def test_no_piece_takes_more_than_is_planned(longest, pieces, tokens):
    """`at_once` rows of the longest bound every piece of every step, however rows are dealt to processes and parts."""
    lengths = [min(length, longest) for length in lengths_of(613)]
    planned = TrainingOptions(batch_tokens=tokens).at_once(longest, pieces)
    for batch in shuffled_batches(lengths, 16, seed=0, epoch=1, tokens=tokens):
        for split in (parts, stretches):
            for piece in split(batch, min(pieces, len(batch))):
                assert len(piece) * max(lengths[i] for i in piece) <= planned * longest
