"""`afina plan`, as a person types it."""

from __future__ import annotations

import json

import pytest
import transformers as tf
import yaml


@pytest.fixture
def recipe(tmp_path):
    """A recipe beside a model of which there is nothing but the configuration."""
    tf.GPT2Config(vocab_size=53, n_embd=16, n_layer=2, n_head=2, n_positions=67).save_pretrained(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tmp_path / "model"), "task": "causal_lm", "training": {"max_length": 31}}))
    return path


def test_parts_and_what_was_taken_for_granted_are_shown(afina, recipe):
    said = afina("plan", recipe, "--device", "cuda", "training.batch_size=3", "r=5")
    assert said.code == 0, said.err
    for part in ("CUDA context", "weights fp32", "adapters", "optimizer", "in all", "every row is taken to have 31 tokens",
                 "3 rows in 1 part", "r=5", "while"):  # fmt: skip
        assert part in said.out, part
    assert not said.err


def test_json_holds_bytes_and_the_choice(afina, recipe):
    said = json.loads(afina("plan", recipe, "--device", "cuda", "--memory", "20GB", "--json").out)
    assert said["fits"] is True
    assert said["chosen"] == {"bytes": said["bytes"]}
    assert said["bytes"] == sum(said["moments"][said["decisive"]]["device"].values())


def test_where_nothing_fits_the_least_is_told(afina, recipe):
    said = afina("plan", recipe, "--device", "cuda", "--memory", "100MB", "training.batch_size=2")
    assert said.code == 1
    assert "too much" in said.out
    assert "nothing fits into 0.10 GB" in said.err
    assert "CUDA context" in said.err


def test_rows_of_a_file_are_planned_with_their_true_length(afina, places):
    said = afina(
        "plan", f"data.file={places / 'rows.csv'}", "data.text=message", "data.label=label", f"model={places / 'base'}"
    )
    assert "the longest rows of the file: 19 tokens" in said.out, said.err


def test_problems_are_told_together(afina, recipe):
    said = afina("plan", recipe, "--device", "gpu", "--processes", "0", "--memory", "much")
    assert said.code == 1
    for part in ("--device gpu: expected cpu or cuda", "--processes 0", "--memory: 'much' is no amount"):
        assert part in said.err, part


def test_keys_are_named_as_they_are_typed_to_plan(afina, tmp_path):
    """Which has no --max-length and no --data."""
    said = afina("plan", "training.learning_rate=nan", "memory.limit=much")
    assert said.code == 1
    for part in ("training.max_length is missing: without data.file", "training.learning_rate=nan: expected a finite number",
                 "--memory: 'much' is no amount"):  # fmt: skip
        assert part in said.err, part


def test_training_chooses_the_settings_that_fit_and_writes_them_down(afina, places, tmp_path):
    from afina.memory.measure import resident

    words = ["train", "--data", places / "rows.csv", "--text", "message", "--label", "label", "--model", places / "base"]
    words += ["--epochs", "1", "--batch-size", "64"]
    assert afina(*words, "--memory", "99GB", "--output", tmp_path / "first").code == 0  # everything is imported from now on
    limit = f"{resident() * 1.02 / 0.9 / 1e6:.0f}MB"
    said = afina(*words, "--memory", limit, "--output", tmp_path / "run")
    assert said.code == 0, said.err
    assert "planned" in said.out
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["memory"]["limit"] == limit
