"""T40: encoding within the process group runs into its time-out."""

from __future__ import annotations

import copy

import torch
from tiny_bases import save_bert, write_rows

from afina.tasks.sequence_classification import SequenceClassification
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare


def test_t40_rows_are_encoded_once_and_before_processes_meet(tmp_path, monkeypatch):
    """Whatever encoding takes, no process waits in a collective meanwhile; and those that come later find it done."""
    data = DataOptions(str(write_rows(tmp_path / "rows.csv", 43)), "message", "label")
    recipe = Recipe(model=str(save_bert(tmp_path / "base")), data=data, training=TrainingOptions(precision="fp32"))
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    first = prepare(copy.deepcopy(recipe), tmp_path / "run")
    assert not torch.distributed.is_initialized()

    def encode(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(SequenceClassification, "encode", encode)
    second = prepare(copy.deepcopy(recipe), tmp_path / "run")
    assert [list(side.features) for side in second.rows.values()] == [list(side.features) for side in first.rows.values()]
