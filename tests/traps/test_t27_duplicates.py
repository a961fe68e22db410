"""T27: a text that stands on both sides of a split, exactly or nearly, makes the test score a lie."""

from __future__ import annotations

import random

import pytest
from rows_made import cut, table, texts

from afina.data.clean import normalised
from afina.data.similar import near_duplicates

DAYS = [f"2026-{1 + i // 28:02}-{1 + i % 28:02}" for i in range(200)]


def made(sides=None, **more):
    """151 messages, 29 of them again letter by letter (but for case and space), 23 nearly so."""
    chance = random.Random(4)
    own = texts(151)
    again = [f"  {text.upper()}" for text in chance.sample(own, 29)]
    nearly = [text.replace(text[9], "q", 1) for text in chance.sample(own, 20)]
    nearly += [f"{text}!" for text in nearly[:3]]
    everything = own + again + nearly
    label = {normalised(text): "ab"[i % 3 > 1] for i, text in enumerate(own)}
    rows = [(text, label.get(normalised(text), "a")) for text in everything]
    order = chance.sample(range(len(rows)), len(rows))
    return table([rows[i] for i in order], sides=sides, more={k: v[: len(rows)] for k, v in more.items()})


def given(number):
    return random.Random(7).choices(["train", "validation", "test"], weights=(7, 1, 2), k=number)


WAYS = {
    "stratified": (made(), {}),
    "grouped": (made(who=[str(i % 37) for i in range(203)]), {"group": "who"}),
    "time": (made(day=(DAYS * 2)[:203]), {"time": "day"}),
    "a column says": (made(part=given(203)), {"split_column": "part"}),
    "files say": (made(sides=given(203)), {}),
    "undersampled first": (made(), {"balance": "undersample_before_split"}),
    "oversampled": (made(), {"balance": "oversample"}),
}


@pytest.mark.parametrize("near", ["together", "drop"])
@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_t27_no_text_is_on_two_sides(way, duplicates, near):
    rows, options = WAYS[way]
    done = cut(rows, clean={"duplicates": duplicates, "near_duplicates": near}, **options)
    side_of = {i: side for side, chosen in done.sides.items() for i in chosen}
    assert all(done.sides.values())
    kept = sorted(side_of)
    groups = near_duplicates([normalised(done.examples[i].text) for i in kept])
    assert all(len({side_of[kept[k]] for k in group}) == 1 for group in groups)
    assert bool(done.cleaned.duplicates) == duplicates
    if near == "drop":
        assert done.cleaned.near_dropped
        assert not groups
    report = done.report()
    assert report["split"] == ("given" if "say" in way else {"stratified": "stratified"}.get(way, report["split"]))


@pytest.mark.parametrize("way", ["time", "a column says", "files say"])
def test_t27_what_leaks_is_dropped_from_the_earlier_side_and_listed(way):
    rows, options = WAYS[way]
    done = cut(rows, **options)
    assert done.leaks
    assert not set(done.leaks) & {e.line for e in done.examples}
    assert any("dropped: nearly the same text" in line for line in done.lines())


def test_t27_copies_that_are_left_are_counted():
    done = cut(made(), clean={"duplicates": False, "near_duplicates": "ignore", "conflicts": False})
    assert len(done.examples) == 203
    said = [note for note in done.notes if "test rows have the same or nearly the same text in train or validation" in note]
    assert len(said) == 1
    side_of = {i: side for side, chosen in done.sides.items() for i in chosen}
    groups = near_duplicates([normalised(e.text) for e in done.examples])
    known = sum(side_of[i] == "test" and len({side_of[k] for k in g}) > 1 for g in groups for i in g)
    assert said[0].startswith(f"{known} of {len(done.sides['test'])} test rows")


def test_t27_the_same_seed_gives_the_same_rows():
    for rows, options in WAYS.values():
        assert cut(rows, seed=3, **options).sides == cut(rows, seed=3, **options).sides
    assert cut(made(), seed=3).sides != cut(made(), seed=4).sides
