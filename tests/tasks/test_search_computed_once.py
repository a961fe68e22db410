"""Vectors and rerankers above a frozen trunk learn the same, whether it is computed once or in every step."""

from __future__ import annotations

import pytest
import torch
from every_task import case

from afina.training.run import prepare

UPPER = {"name": "lora", "r": 3, "target_modules": "all-linear", "layers_to_transform": [1]}


@pytest.mark.parametrize("name", ["reranking", "sentence_similarity"])
def test_a_trunk_computed_once_teaches_the_same(name, tmp_path, monkeypatch):
    """Rows with wrong passages, in two parts a step."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    weights, notes = {}, {}
    for cache in ("off", "1GB"):
        recipe = case("reranking", tmp_path, trunk_cache=cache, gradient_accumulation=2, epochs=2)
        recipe.task, recipe.method = {"name": name}, dict(UPPER)
        run = prepare(recipe, tmp_path / cache)
        notes[cache] = " ".join(run.execute()["train"]["notes"])
        weights[cache] = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    for n, weight in weights["off"].items():
        torch.testing.assert_close(weights["1GB"][n], weight, rtol=1e-2, atol=2e-4)
    assert "computed once a row" in notes["1GB"]
    assert "computed in every step (training.trunk_cache=off" in notes["off"]
