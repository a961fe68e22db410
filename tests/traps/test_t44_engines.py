"""T44: asked for FSDP2 or ZeRO, got something else. What two processes built: tests/training/test_engines.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from afina.errors import TrainingError
from afina.training.engines import ddp, fsdp2
from afina.training.engines.choose import ENGINES, make_engine
from afina.training.recipe import ENGINES as NAMES


@pytest.fixture(autouse=True)
def no_group_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def adamw(named):
    return torch.optim.AdamW(named.values(), lr=1e-3)


def test_every_engine_of_a_recipe_is_there():
    assert tuple(ENGINES) == NAMES
    assert all(engine.name == name for name, engine in ENGINES.items())


def test_t44_an_engine_that_divides_nothing_is_found_out(monkeypatch):
    monkeypatch.setattr(fsdp2, "fully_shard", lambda module, **_: module)
    engine = make_engine("fp32", "fsdp2")
    with pytest.raises(TrainingError, match=r"fsdp2 was asked for 1 processes, but 2 parameters were not divided"):
        engine.prepare(nn.Linear(3, 5), adamw)


def test_t44_processes_that_would_each_train_a_model_of_their_own_are_found_out(monkeypatch):
    monkeypatch.setattr(ddp.DDP, "processes", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="the model was wrapped as a Work"):
        make_engine("fp32").prepare(nn.Linear(3, 5), adamw)


def test_t44_what_was_built_is_stated():
    engine = make_engine("fp32", "fsdp2")
    engine.prepare(nn.Linear(3, 5), adamw)
    assert engine.built() == {
        "engine": "fsdp2", "processes": 1, "weights_bytes": 80, "weights_bytes_of_a_process": 80
    }  # fmt: skip


def test_blocks_are_the_outermost_lists_and_none_of_an_adapter():
    inner = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "layers": nn.ModuleList([inner, nn.ReLU(), nn.Linear(2, 2)])})
    assert fsdp2.blocks(model) == [inner, model["layers"][2]]
