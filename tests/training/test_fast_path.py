"""Runs that compute less learn the same."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from test_loop import places, prepared  # noqa: F401 (a fixture)
from tiny_bases import save_gpt2, write_rows

LAST = {"name": "last_layers", "num_layers": 1}
UPPER = {"name": "lora", "r": 3, "target_modules": "all-linear", "layers_to_transform": [1]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, places):  # noqa: F811
    folder = tmp_path_factory.mktemp("fast")
    return {"bert": places, "gpt2": (str(save_gpt2(folder / "gpt2")), str(write_rows(folder / "rows.csv")))}


def weights(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", [LAST, UPPER], ids=["last_layers", "lora"])
@pytest.mark.parametrize("base", ["bert", "gpt2"])
def test_a_trunk_computed_once_teaches_the_same(bases, tmp_path, monkeypatch, base, method):
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    runs, metrics = {}, {}
    for cache in ("off", "1GB"):
        run = prepared(bases[base], tmp_path / cache, method=dict(method), trunk_cache=cache, epochs=3)
        metrics[cache] = run.execute()
        runs[cache] = weights(run)
    for name, weight in runs["off"].items():
        torch.testing.assert_close(runs["1GB"][name], weight, rtol=1e-2, atol=2e-4)
    assert metrics["1GB"]["test"]["loss"] == pytest.approx(metrics["off"]["test"]["loss"], rel=1e-3)
    assert "computed once a row" in " ".join(metrics["1GB"]["train"]["notes"])
    assert "computed in every step (training.trunk_cache=off" in " ".join(metrics["off"]["train"]["notes"])
    again = prepared(bases[base], tmp_path / "again", method=dict(method), trunk_cache="1GB", epochs=3).execute()
    assert "in a run before" in " ".join(again["train"]["notes"])
    assert again["test"] == metrics["1GB"]["test"]


@pytest.mark.parametrize("base", ["bert", "gpt2"])
def test_every_path_is_told(bases, tmp_path, base):
    notes = prepared(bases[base], tmp_path / "a", method={"name": "lora", "r": 2}, epochs=1).execute()["train"]["notes"]
    assert f"the last block is computed at the {'first' if base == 'bert' else 'last'} token of each row" in " ".join(notes)
    assert "something is trained in or before the first block" in " ".join(notes)
    prompts = {"name": "prompt_tuning", "num_virtual_tokens": 3}
    notes = prepared(bases[base], tmp_path / "b", method=prompts, epochs=1).execute()["train"]["notes"]
    assert any("every block is computed in every step" in note or "acts on all blocks" in note for note in notes)
    kept = prepared(bases[base], tmp_path / "c", method=dict(LAST), epochs=1, frozen_dropout="keep").execute()
    assert "training.frozen_dropout=keep" in " ".join(kept["train"]["notes"])


def test_states_of_other_trunks_make_room(bases, tmp_path, monkeypatch):
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    for base in ("bert", "gpt2"):
        prepared(bases[base], tmp_path / base, method=dict(LAST), epochs=1, trunk_cache="150kB").execute()
    kept = [p for p in (tmp_path / "cache" / "trunk").iterdir() if p.is_dir()]
    assert sum(f.stat().st_size for p in kept for f in p.glob("*.bin")) <= 150_000
    assert len(kept) == 1


def test_a_resumed_run_goes_on_as_it_began(bases, tmp_path):
    whole = prepared(bases["bert"], tmp_path / "whole", method=dict(LAST), epochs=3)
    whole.execute()
    run = prepared(bases["bert"], tmp_path / "part", method=dict(LAST), epochs=3, keep_checkpoints=9)
    run.execute()
    from afina.training.run import prepare

    again = prepare(run.recipe, tmp_path / "part", resume=True, from_step=10)
    again.execute()
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight), name
    assert json.loads((tmp_path / "part" / "metrics.json").read_text())["train"]["notes"]


def test_a_trunk_with_no_place_for_its_states_is_computed_in_every_step(bases, tmp_path, monkeypatch):
    """The run goes on, and says why it is slower."""
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "trunk").symlink_to(file)
    notes = prepared(bases["bert"], tmp_path / "a", method=dict(LAST), epochs=1).execute()["train"]["notes"]
    assert any("cannot be written" in note and "computed in every step" in note for note in notes)
    monkeypatch.setattr("afina.training.fast_path.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    (tmp_path / "cache" / "trunk").unlink()
    notes = prepared(bases["bert"], tmp_path / "b", method=dict(LAST), epochs=1).execute()["train"]["notes"]
    assert any("has room for 0" in note for note in notes)


def test_what_takes_a_while_is_told_before(bases, tmp_path, monkeypatch):
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    lines: list[dict] = []
    run = prepared(bases["gpt2"], tmp_path / "a", method=dict(LAST), epochs=1)
    run.execute(lines.append)
    count = sum(len(run.rows[side].features) for side in ("train", "validation"))
    assert lines[0] == {"said": f"computing the first 1 of 2 blocks, which are frozen, once for {count} rows"}
