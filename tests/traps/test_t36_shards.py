"""T36: weights in shards are saved whole or not at all. Round trips over two processes: tests/training/test_engines.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_bases import save_bert, write_rows

from afina.core.files import read_weights
from afina.errors import CheckpointError, TrainingError
from afina.training.engines.choose import make_engine
from afina.training.optimizers import make_optimizer
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare


@pytest.fixture
def divided(tmp_path):
    """A model in shards, of one process: where there are more, it is the same parameters that are not whole."""
    recipe = Recipe(
        model=str(save_bert(tmp_path / "base")),
        data=DataOptions(file=str(write_rows(tmp_path / "rows.csv", 43)), text="message", label="label"),
        training=TrainingOptions(precision="fp32"),
    )
    run = prepare(recipe, tmp_path / "run")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    engine = make_engine("fp32", "fsdp2")
    engine.prepare(run.model, lambda named: make_optimizer("adamw", named, 1e-3, 0.0))
    yield engine, run.model, before
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def test_t36_what_is_in_shards_is_saved_whole_or_not_at_all(divided, tmp_path):
    engine, model, before = divided
    older = tmp_path / "adapter"
    with engine.whole():
        model.save_pretrained(older)
    kept = read_weights(older / "adapter_model.safetensors")
    assert sum(t.numel() for t in kept.values()) == sum(t.numel() for t in before.values())
    with pytest.raises(CheckpointError, match="is a shard, of which other processes hold the rest; nothing was written"):
        model.save_pretrained(older)
    after = read_weights(older / "adapter_model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in kept.items())  # the older file is as it was


def test_t36_weights_of_another_size_are_refused(divided, monkeypatch):
    engine, _, before = divided
    made = engine.weights()
    assert all(torch.equal(made[name], value) for name, value in before.items())
    name = next(iter(made))
    monkeypatch.setattr(engine, "_gathered", lambda: {**made, name: made[name][:1]})
    with pytest.raises(TrainingError, match=r"did not come back whole.*expected"):
        engine.weights()


def test_t36_whole_weights_go_into_shards_and_back(divided):
    engine, _, before = divided
    other = {name: torch.randn_like(value) for name, value in before.items()}
    engine.put(other)
    assert all(torch.equal(value, other[name]) for name, value in engine.weights().items())
