"""T20: where the padding token is the end token, masking by its id would leave a model that never learned to stop."""

from __future__ import annotations

import pytest
from language_bases import bart_like, features_of, gpt2_like, llama_like, save, t5_like, task_of

from afina.errors import ConfigError
from afina.tasks.task import IGNORED

PAIRS = [{"text": "Why?", "label": "No."}, {"text": "Name seven fruits that are red.", "label": "the quick brown fox, 13"}]


@pytest.mark.parametrize("make", [llama_like, gpt2_like])
@pytest.mark.parametrize("template", ["plain", "bare"])
def test_t20_every_example_ends_with_a_learned_end_token_and_learned_padding_is_none(make, template):
    tokenizer = make()
    task = task_of("causal_lm", tokenizer, PAIRS, template=template)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    features = features_of(task, PAIRS).features
    labels = task.collate(features)["labels"].tolist()
    widths = [len(feature["input_ids"]) for feature in features]
    assert widths[0] < widths[1]
    for row, width in zip(labels, widths, strict=True):
        assert row[width - 1] == tokenizer.eos_token_id
        assert all(label == IGNORED for label in row[width:])


def test_t20_text_alone_ends_too():
    rows = [{"text": "The fox is quick and brown."}, {"text": "Oslo."}]
    task = task_of("causal_lm", gpt2_like(), rows)
    assert all(f["labels"][-1] == task.tokenizer.eos_token_id for f in features_of(task, rows).features)


@pytest.mark.parametrize(("architecture", "make"), [("T5", t5_like), ("BART", bart_like), ("T5", gpt2_like)])
def test_t20_targets_of_a_decoder_end_whatever_the_tokenizer_does(architecture, make, tmp_path):
    """The last of these tokenizers puts no end token behind a text, and pads with it."""
    tokenizer = make()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    task = task_of("seq2seq", tokenizer, PAIRS)
    task.load_model(str(save(tmp_path / "base", architecture, tokenizer)))
    features = features_of(task, PAIRS).features
    labels = task.collate(features)["labels"].tolist()
    for row, feature in zip(labels, features, strict=True):
        ids = feature["labels"]
        assert ids[-1] == tokenizer.eos_token_id
        assert row == [*ids, *[IGNORED] * (len(row) - len(ids))]


@pytest.mark.parametrize("name", ["causal_lm", "seq2seq"])
def test_t20_a_tokenizer_without_an_end_token_is_refused(name):
    tokenizer = gpt2_like()
    tokenizer.pad_token, tokenizer.eos_token = "<|im_end|>", None
    with pytest.raises(ConfigError, match="no end token"):
        task_of(name, tokenizer, PAIRS)
