"""Watching a run from the command line: quiet, and with trackers."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def train(afina, places, tmp_path):
    def run(*words):
        return afina(
            "train", "--data", places / "rows.csv", "--model", places / "base", "--output", tmp_path / "run", "--overwrite",
            "--epochs", "1", *words,
        )  # fmt: skip

    return run


def test_quiet_leaves_the_training_out_and_the_outcome_in(train):
    loud, quiet = train(), train("--quiet")
    assert loud.code == quiet.code == 0
    assert "epoch 1  loss" in loud.out
    assert "epoch 1  loss" not in quiet.out
    assert "Test: " in quiet.out


def test_the_last_evaluation_is_said_to_be_also_where_a_run_ends_early(train, tmp_path):
    for words, most in ((("--epochs", "2"), 2), (("--epochs", "40", "training.patience=1", "--learning-rate", "1e-9"), 39)):
        said = train(*words)
        assert said.code == 0, said.err
        lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        read = [line["last"] for line in lines if "validation_loss" in line]
        assert read == [*([False] * (len(read) - 1)), True]
        assert len(read) <= most


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own protocol files
def test_a_run_feeds_its_trackers(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = train("training.trackers=tensorboard")
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [e.value for e in events.Scalars("train/loss")]
    assert losses == pytest.approx([line["loss"] for line in lines if "loss" in line])
    read = [line["step"] for line in lines if "validation_loss" in line]
    assert [e.step for e in events.Scalars("validation/loss")] == read
    assert events.Scalars("test/accuracy")[0].value == pytest.approx(metrics["test"]["accuracy"])
    assert "tensorboard" in (tmp_path / "run" / "recipe.yaml").read_text()
    train()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_an_unknown_tracker_is_told_before_training(train, tmp_path):
    said = train("training.trackers=tensorbord,wandb2")
    assert said.code == 1
    assert "'tensorboard'?" in said.err
    assert "wandb2: there is no such tracker" in said.err
    assert not (tmp_path / "run").exists()
