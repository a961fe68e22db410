"""Tags and entities: against seqeval on sequences of every kind, and laws of schemes and paths."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from afina.tasks.entities import Scheme, find_scheme, legal_path, scores

LETTERS = {"IOB1": "BI", "IOB2": "BI", "BIOES": "BIES"}


def tags_of(name):
    return ["O", *(f"{letter}-{kind}" for letter in LETTERS[name] for kind in ("a", "b-c"))]


def sequences(name, count, *, legal=None, seed=0, length=9):
    """Random tags; `legal`: only those that keep the scheme, or only those that break it."""
    chance, scheme = random.Random(seed), Scheme(name)
    while count:
        tags = [chance.choice(tags_of(name)) for _ in range(chance.randrange(1, length))]
        if legal is None or scheme.illegal(tags) != legal:
            count -= 1
            yield tags


@pytest.mark.parametrize("name", LETTERS)
def test_entities_are_those_of_seqeval(name):
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="seqeval is not installed")
    schemes = pytest.importorskip("seqeval.scheme")
    strict = {"IOB1": schemes.IOB1, "IOB2": schemes.IOB2, "BIOES": schemes.IOBES}[name]
    scheme = Scheme(name)
    for tags in sequences(name, 2000):
        assert [(kind, first, last - 1) for kind, first, last in scheme.entities(tags)] == labeling.get_entities(tags), tags
    for tags in sequences(name, 300, legal=True):
        found = schemes.Entities([tags], strict).entities[0]
        assert scheme.entities(tags) == [(e.tag, e.start, e.end) for e in found], tags


@pytest.mark.parametrize("name", LETTERS)
@pytest.mark.parametrize("legal", [None, True])
def test_scores_are_those_of_seqeval(name, legal):
    metrics = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    truth = list(sequences(name, 97, legal=legal, seed=1))
    chance = random.Random(2)
    answers = [[tag if chance.random() < 0.6 else chance.choice(tags_of(name)) for tag in tags] for tags in truth]
    for found in (answers, truth, [["O"] * len(tags) for tags in truth]):
        ours = scores(truth, found, Scheme(name))
        theirs = metrics.classification_report(truth, found, output_dict=True, zero_division=0)
        for average, prefix in (("micro avg", ""), ("macro avg", "macro_")):
            assert ours[f"{prefix}f1"] == pytest.approx(theirs[average]["f1-score"])
        assert ours["precision"] == pytest.approx(theirs["micro avg"]["precision"])
        assert ours["recall"] == pytest.approx(theirs["micro avg"]["recall"])
        assert ours["accuracy"] == pytest.approx(metrics.accuracy_score(truth, found))
        for kind, values in ours["per_type"].items():
            assert values["f1"] == pytest.approx(theirs[kind]["f1-score"])
            assert values["entities"] == theirs[kind]["support"]


def test_awkward_cases():
    """What is right and what is not, said by hand."""
    scheme = Scheme("IOB2")
    right = [["B-PER", "I-PER", "O", "B-LOC"]]
    for found, f1 in (
        (["B-PER", "I-PER", "O", "B-LOC"], 1.0),
        (["B-PER", "O", "O", "B-LOC"], 0.5),  # too short an entity is wrong
        (["B-PER", "I-PER", "O", "B-ORG"], 0.5),  # and one of another type
        (["I-PER", "I-PER", "O", "I-LOC"], 1.0),  # as conlleval reads what breaks the scheme
        (["B-PER", "B-PER", "O", "B-LOC"], 0.4),
        (["O", "O", "O", "O"], 0.0),
    ):
        assert scores(right, [found], scheme)["f1"] == pytest.approx(f1)
    nothing = scores([["O", "O"]], [["O", "O"]], scheme)
    assert (nothing["f1"], nothing["accuracy"]) == (0.0, 1.0)


@pytest.mark.parametrize("name", LETTERS)
def test_the_scheme_is_found_and_broken_texts_are_counted(name):
    chosen = [*sequences(name, 211, legal=True), tags_of(name)]
    scheme, illegal = find_scheme(chosen[:-1])
    assert (scheme.name, illegal) == (name, 0)
    broken = list(sequences(name, 13, legal=False, seed=3))
    scheme, illegal = find_scheme([*chosen[:-1], *broken])
    assert (scheme.name, illegal) == (name, 13)


@pytest.mark.parametrize(
    ("texts", "name", "entities"),
    [
        ([["NOUN", "VERB", "NOUN", "NOUN"]], "plain", [("NOUN", 0, 1), ("VERB", 1, 2), ("NOUN", 2, 3), ("NOUN", 3, 4)]),
        ([["PER", "PER", "O", "LOC"]], "IO", [("PER", 0, 2), ("LOC", 3, 4)]),
        ([["I-PER", "I-PER", "O", "I-LOC"]], "IOB1", [("PER", 0, 2), ("LOC", 3, 4)]),
        ([["B", "I", "O", "B"]], "IOB2", [("", 0, 2), ("", 3, 4)]),
        ([["B-x", "L-x", "O", "U-y"]], "BIOES", [("x", 0, 2), ("y", 3, 4)]),
        ([["B_x", "I_x", "O", "O"]], "IOB2", [("x", 0, 2)]),
        ([["E-mail", "O", "web", "O"]], "IO", [("E-mail", 0, 1), ("web", 2, 3)]),
    ],
)
def test_other_ways_of_tagging(texts, name, entities):
    scheme, illegal = find_scheme(texts)
    assert (scheme.name, illegal) == (name, 0)
    assert scheme.entities(texts[0]) == entities


@pytest.mark.parametrize("name", LETTERS)
def test_the_path_is_the_best_legal_one(name):
    """Against all paths, for texts of up to four words."""
    labels, scheme, chance = tags_of(name), Scheme(name), np.random.default_rng(0)
    changed = 0
    for length in (1, 2, 3, 4):
        for _ in range(7):
            p = chance.dirichlet(np.full(len(labels), 0.3), size=length)
            paths = itertools.product(range(len(labels)), repeat=length)
            legal = [s for s in paths if not scheme.illegal([labels[i] for i in s])]
            best = max(legal, key=lambda s: sum(np.log(p[i, t]) for i, t in enumerate(s)))
            assert legal_path(p, labels, scheme) == list(best)
            changed += list(best) != list(p.argmax(axis=1))
    assert changed > 3
    assert legal_path(np.zeros((0, len(labels))), labels, scheme) == []
