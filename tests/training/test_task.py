"""Sequence classification: batches that change no answer, and texts that are cut."""

from __future__ import annotations

import pytest
import torch
from tiny_bases import WORDS, save_bert, save_gpt2

from afina.data.example import Example
from afina.errors import ConfigError, DataError
from afina.tasks.sequence_classification import SequenceClassification
from afina.training.models import find_model, load_tokenizer

TEXTS = ["w1 w2 late", "w3", "w5 w7 w11 w13 w17 thanks w19", "hello w2"]


def features(task, texts, *limits):
    return task.encode([Example(text, "", i) for i, text in enumerate(texts)], *limits or (None, 61)).features


def task_and_model(folder):
    source = find_model(str(folder))
    task = SequenceClassification(load_tokenizer(source), learned={"labels": ["no", "yes", "perhaps"]})
    return task, task.load_model(source.path).eval()


@pytest.fixture(scope="module", params=[save_bert, save_gpt2], ids=["bert", "gpt2"])
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("base"))


@torch.no_grad()
def test_t22_neither_padding_nor_its_side_changes_an_answer(folder):
    task, model = task_and_model(folder)
    made = features(task, TEXTS)
    together = task.logits(model, task.collate(made))
    alone = torch.cat([task.logits(model, task.collate([row])) for row in made])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    for side in ("left", "right"):
        task.tokenizer.padding_side = side
        torch.testing.assert_close(task.logits(model, task.collate(features(task, TEXTS))), together, rtol=0, atol=0)


@torch.no_grad()
def test_t20_end_tokens_that_are_padding_tokens_too(tmp_path):
    """A text that ends in the end token is pooled at its last real token, alone and in a batch."""
    task, model = task_and_model(save_gpt2(tmp_path))
    assert task.tokenizer.pad_token == task.tokenizer.eos_token
    ended = features(task, ["w1 late <|endoftext|>", "w1 late", "w1 w2 w3 w4 w5"])
    answers = task.logits(model, task.collate(ended))
    torch.testing.assert_close(answers[0], answers[1])
    with pytest.raises(DataError, match="no token at all"):
        features(task, ["<|endoftext|>"])


def test_head_and_names(folder):
    _, model = task_and_model(folder)
    assert model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert model.config.num_labels == 3


def test_t30_texts_that_are_cut_are_counted(folder):
    task, _ = task_and_model(folder)
    encoded = task.encode([Example(t, "", 1) for t in (*TEXTS, " ".join(WORDS))], 9, 61)
    assert encoded.truncated == 1
    assert max(encoded.lengths) == 9
    assert task.encode([Example(t, "", 1) for t in TEXTS], None, 61).truncated == 0


def test_a_checkpoint_without_its_body_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_bert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(k for k in weights if "layer.1.attention.self.value.weight" in k)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights below the head.*value\.weight"):
        task_and_model(tmp_path)
