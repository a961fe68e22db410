"""Widths of batches on a CPU in 16 bits: few of them, none wider than the longest row, and the same learned."""

from __future__ import annotations

import pytest
import torch
from test_loop import places, prepared  # noqa: F401 (a fixture)

from afina.training.fast_path import fast_path
from afina.training.loop import make_engine


@pytest.mark.parametrize(("precision", "multiple"), [("bf16", 4), ("fp32", 1)])
def test_t35_batches_have_few_widths_and_it_is_told(places, tmp_path, precision, multiple):  # noqa: F811
    run = prepared(places, tmp_path, precision=precision)
    task, longest = run.task, max(max(side.lengths) for side in run.rows.values())
    features = sorted(run.rows["train"].features, key=lambda f: len(f["input_ids"]))
    with fast_path(run.model, task, run.rows, run.recipe.training, make_engine(precision)) as notes:
        for feature in features:
            own, found = len(feature["input_ids"]), task.collate([features[0], feature])["input_ids"].shape[1]
            assert found == min(-(-own // multiple) * multiple, longest)
        assert any("padded to a multiple of 4 tokens" in note for note in notes) == (multiple > 1)
    assert task.collate(features[:1])["input_ids"].shape[1] == len(features[0]["input_ids"])


def test_more_padding_changes_rounding_alone(places, tmp_path, monkeypatch):  # noqa: F811
    losses = {}
    for multiple in (1, 4):
        monkeypatch.setattr("afina.training.fast_path._WIDTHS", multiple)
        run = prepared(places, tmp_path / str(multiple), precision="bf16", epochs=1)
        told: list[float] = []
        run.execute(lambda line, told=told: told.append(line["loss"]) if "gradient_norm" in line else None)
        losses[multiple] = told
    assert losses[1] == pytest.approx(losses[4], rel=3e-2)


@pytest.mark.parametrize("size", [0.25, 4.0, float("nan")])
def test_gradients_are_cut_as_torch_cuts_them(size):
    """Also where nothing is cut and they are not touched, and where there is no finite norm."""
    layer, engine = torch.nn.Linear(7, 5), make_engine("fp32")
    engine.prepare(layer, lambda trained: torch.optim.SGD(trained.values(), lr=0.1))
    given = [torch.randn_like(p) for p in layer.parameters()]
    given = [g * size / torch.nn.utils.get_total_norm(given) for g in given]
    norms, cut = [], []
    for clip in (engine._clip, lambda most: torch.nn.utils.clip_grad_norm_(layer.parameters(), most)):
        for p, g in zip(layer.parameters(), given, strict=True):
            p.grad = g.clone()
        norms.append(float(clip(1.0)))
        cut.append([p.grad.clone() for p in layer.parameters()])
    assert norms[0] == pytest.approx(norms[1], nan_ok=True)
    for ours, theirs in zip(*cut, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    engine.close()
