"""T40: encoding within the process group runs into its time-out."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from tiny_bases import save_bert, write_rows

from afina.errors import ConfigError, LostProcessError
from afina.tasks.sequence_classification import SequenceClassification
from afina.training import first
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare


def test_t40_rows_are_encoded_once_and_before_processes_meet(tmp_path, monkeypatch):
    """Whatever encoding takes, no process waits in a collective meanwhile; and those that come later find it done."""
    data = DataOptions(str(write_rows(tmp_path / "rows.csv", 43)), "message", "label")
    recipe = Recipe(model=str(save_bert(tmp_path / "base")), data=data, training=TrainingOptions(precision="fp32"))
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    before = torch.distributed.is_initialized()
    first = prepare(copy.deepcopy(recipe), tmp_path / "run")
    assert torch.distributed.is_initialized() == before

    def encode(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(SequenceClassification, "encode", encode)
    second = prepare(copy.deepcopy(recipe), tmp_path / "run")
    assert [list(side.features) for side in second.rows.values()] == [list(side.features) for side in first.rows.values()]


@pytest.fixture
def two(monkeypatch):
    """As the processes of one launcher see it; call with the rank that is meant."""
    turn = next(first._turns)  # the same in both

    def be(rank):
        for name, value in {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_PORT": f"test-{os.getpid()}"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(first, "_turns", iter([turn]))

    return be


def test_t40_the_others_wait_as_long_as_the_first_prepares(two):
    order = []

    def other():
        with first.first_of_the_node():
            order.append("second")

    two(1)
    waiting = threading.Thread(target=other)
    waiting.start()
    time.sleep(0.3)  # it looked for a file that is not there yet
    two(0)
    with first.first_of_the_node():
        time.sleep(0.3)
        order.append("first")
    waiting.join(20)
    assert order == ["first", "second"]


def test_t40_what_ends_the_first_ends_the_others_without_a_second_message(two):
    two(0)
    with pytest.raises(ConfigError), first.first_of_the_node():
        raise ConfigError("no such column")
    two(1)
    with pytest.raises(LostProcessError) as error, first.first_of_the_node():
        raise AssertionError("prepared all the same")
    assert error.value.told


def test_t40_a_first_process_that_was_killed_is_noticed(two):
    two(0)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    sign = first._sign(next(first._turns))
    sign.write_text(f"began {gone.pid}")
    two(1)
    with pytest.raises(LostProcessError, match="ended while it prepared") as error, first.first_of_the_node():
        pass
    assert not error.value.told
