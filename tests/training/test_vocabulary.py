"""T8: tokenizer and model are checked against each other, and new tokens get rows that are trained and stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_bases import save_bert, save_gpt2, tokenizer, write_rows

from afina.core.files import read_weights
from afina.errors import ConfigError
from afina.tasks.sequence_classification import SequenceClassification
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun


def recipe_for(base, rows, method, tokens=()):
    data = DataOptions(file=str(rows), text="message", label="label", new_tokens=list(tokens))
    return Recipe(model=str(base), data=data, method=method, training=TrainingOptions(epochs=2, precision="fp32"))


@pytest.mark.parametrize("save", [save_bert, save_gpt2])
def test_t08_new_tokens_are_trained_stored_and_read_back(save, tmp_path):
    rows = write_rows(tmp_path / "rows.csv", 59)
    rows.write_text(rows.read_text().replace("late", "verylate").replace("thanks", "manythanks"))
    base = save(tmp_path / "base")
    words = ["verylate", "manythanks", "w1"]
    run = prepare(recipe_for(base, rows, {"name": "lora", "r": 3, "target_modules": "all-linear"}, words), tmp_path / "run")
    known = len(tf.AutoTokenizer.from_pretrained(base))
    assert [run.task.tokenizer.convert_tokens_to_ids(w) for w in words[:2]] == [known, known + 1]
    assert "2 tokens that the model has no embedding for" in run.notes[0]
    ids = {i for feature in run.rows["train"].features for i in feature["input_ids"]}
    assert {known, known + 1} <= ids
    metrics = run.execute()
    assert metrics["read_back"]["largest_difference"] < 1e-4
    trained = TrainedRun.load(run.output)
    texts = ["w1 verylate w2", "manythanks", "w3"]
    answers = trained.answers(trained.examples([{"text": text} for text in texts]))
    again = run.task.encode(trained.examples([{"text": text} for text in texts]), None, 61).features
    with torch.no_grad():
        expected = [run.task.answers(run.model.eval(), run.task.collate([feature]))[0] for feature in again]
    np.testing.assert_allclose(np.stack(answers), np.stack(expected), rtol=1e-4, atol=1e-5)
    weights = read_weights(run.output / "adapter" / "adapter_model.safetensors")
    deltas = [w for key, w in weights.items() if "trainable_tokens_delta" in key]
    assert [d.shape[0] for d in deltas] == [2]
    # the recipe that was written, with the rows resolved, repeats the run
    again = prepare(recipe_for(base, rows, run.recipe.method, words), tmp_path / "again")
    assert again.execute()["test"] == metrics["test"]


def test_t08_a_method_that_cannot_train_rows_says_so(tmp_path):
    rows = write_rows(tmp_path / "rows.csv", 31)
    recipe = recipe_for(save_bert(tmp_path / "base"), rows, {"name": "prompt_tuning", "num_virtual_tokens": 3}, ["late!"])
    with pytest.raises(ConfigError, match=r"data\.new_tokens need 1 new rows.*take method lora"):
        prepare(recipe, tmp_path / "run")


def test_t08_a_tokenizer_larger_than_its_model(tmp_path):
    base, rows = save_bert(tmp_path / "base"), write_rows(tmp_path / "rows.csv", 31)
    larger = tf.AutoTokenizer.from_pretrained(base)
    larger.add_tokens(["one", "two", "three"])
    larger.save_pretrained(base)
    run = prepare(recipe_for(base, rows, {"name": "lora", "r": 3}), tmp_path / "run")
    assert "3 tokens that the model has no embedding for" in run.notes[0]
    assert run.model.get_base_model().get_input_embeddings().weight.shape[0] == len(larger)


def test_positions_of_roberta_begin_after_the_padding(tmp_path):
    made = tokenizer()
    made.model_max_length = 1_000_000
    torch.manual_seed(0)
    config = tf.RobertaConfig(
        vocab_size=len(made), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=29,
        max_position_embeddings=19, pad_token_id=1,
    )  # fmt: skip
    task = SequenceClassification(made, learned={"labels": ["a", "b"]})
    model = tf.RobertaForSequenceClassification(config).eval()
    assert task.limit(model) == 17
    batch = task.collate([{"input_ids": [2, *[5] * 15, 3], "row": 0}])
    assert task.logits(model, batch).shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        task.logits(model, task.collate([{"input_ids": [2, *[5] * 16, 3], "row": 0}]))
