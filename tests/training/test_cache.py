"""Encoded rows come from the cache as they went in, and only where everything they follow from is the same."""

from __future__ import annotations

import random

import pytest
from tiny_bases import tokenizer

from afina.data.example import Example
from afina.errors import DataError
from afina.tasks.sequence_classification import SequenceClassification
from afina.training import cache
from afina.training.cache import Part, Stored, encoded_once

FEATURES = [
    {"input_ids": [5, 3, 2**31 - 1], "row": 0, "label": 2, "offsets": [[0, 3], [4, 7]], "text": "à 🜁", "share": 0.1},
    {"input_ids": [], "row": 0, "offsets": [], "text": "", "share": 2},
    {"input_ids": [7], "row": 5, "label": 0, "labels": [-100, 11], "offsets": None, "text": "\x00", "share": -1e300},
]


def test_features_come_out_as_they_went_in(tmp_path):
    packed = Stored.of(FEATURES)
    assert list(packed) == FEATURES
    packed.write(tmp_path)
    read = Stored.read(tmp_path)
    assert list(read) == FEATURES
    assert read[-1] == FEATURES[-1]
    assert read[1:] == FEATURES[1:]
    with pytest.raises(IndexError):
        read[3]
    part = Part(read, [2], 5)
    assert list(part) == [{**FEATURES[2], "row": 0}]


def test_random_features_too(tmp_path):
    chance = random.Random(7)
    lists = [[chance.randrange(2**18) for _ in range(chance.randrange(13))] for _ in range(101)]
    features = [{"input_ids": ids, "row": i, "mixed": chance.choice([1, "a", [2], {}])} for i, ids in enumerate(lists)]
    Stored.of(features).write(tmp_path)
    assert list(Stored.read(tmp_path)) == features


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    made = SequenceClassification(tokenizer(), learned={"labels": ["a", "b"]})
    made.times = 0
    original = made.encode

    def encode(*arguments):
        made.times += 1
        return original(*arguments)

    made.encode = encode
    return made


ROWS = [Example("w1 w2 late", "a", 1), Example("w3", "b", 2), Example("w5 w7 w11 w13 w17 thanks", "a", 3)]


def test_the_same_rows_are_encoded_once_and_others_again(task):
    plain = SequenceClassification(tokenizer(), learned=task.learned).encode(ROWS, 5, 61)
    for _ in range(3):
        made = encoded_once(task, ROWS, 5, 61)
        assert (list(made.features), made.truncated, made.max_length) == (list(plain.features), plain.truncated, 5)
    assert task.times == 1
    encoded_once(task, ROWS, 4, 61)
    encoded_once(task, ROWS[:2], 5, 61)
    encoded_once(task, [*ROWS[:2], Example(ROWS[2].text, "b", 3)], 5, 61)
    assert task.times == 4
    task.tokenizer.add_tokens(["w1 w2"])
    encoded_once(task, ROWS, 5, 61)
    assert task.times == 5


def test_rows_are_encoded_again_by_another_version(task, monkeypatch):
    encoded_once(task, ROWS, None, 61)
    encoded_once(task, ROWS, None, 61)
    assert task.times == 1
    for name in ("transformers", "tokenizers"):
        monkeypatch.setattr(cache, "version", lambda library, name=name: "7.11.13" if library == name else "1")
        cache._code.cache_clear()
        encoded_once(task, ROWS, None, 61)
    monkeypatch.undo()
    cache._code.cache_clear()
    assert task.times == 3


def test_an_entry_that_is_broken_is_made_again_and_old_ones_go(task, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_KEPT", 3)
    encoded_once(task, ROWS, 5, 61)
    (entry,) = (tmp_path / "cache" / "encoded").iterdir()
    for file in entry.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:50])
    assert list(encoded_once(task, ROWS, 5, 61).features)[1]["label"] == 1
    assert task.times == 2
    for length in range(6, 13):
        encoded_once(task, ROWS, length, 61)
    assert len(list((tmp_path / "cache" / "encoded").iterdir())) == 3


def test_errors_come_through_and_the_cache_can_be_off(task, tmp_path, monkeypatch):
    bare = SequenceClassification(tokenizer(encoder=False), learned=task.learned)
    for _ in range(2):
        with pytest.raises(DataError, match="no token at all"):
            encoded_once(bare, [Example("<|endoftext|>", "a", 1)], 5, 61)
    monkeypatch.setenv("AFINA_CACHE", "off")
    for _ in range(2):
        encoded_once(task, ROWS, 5, 61)
    assert task.times == 2
    assert not list(tmp_path.rglob("encoded.json"))
    monkeypatch.setenv("AFINA_CACHE", "/proc/nowhere")
    assert encoded_once(task, ROWS, 5, 61).truncated == 1
