"""T21: a chat template that does not tell where answers are leaves every label masked, and the loss looks fine."""

from __future__ import annotations

import json

import chat_templates
import pytest
from language_bases import features_of, gpt2_like, llama_like, task_of

from afina.errors import ConfigError, DataError
from afina.tasks.task import IGNORED

TALK = [
    {"role": "user", "content": "Why is the fox red?"},
    {"role": "assistant", "content": "It jumps."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "It is lazy."},
]


@pytest.mark.parametrize("habit", chat_templates.HABITS)
def test_t21_templates_without_marks_for_answers_mask_no_answer(habit):
    """transformers' own mask of the same conversation is empty."""
    tokenizer = llama_like()
    tokenizer.chat_template = chat_templates.HABITS[habit]
    theirs = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert not any(theirs["assistant_masks"])
    rows = [{"text": json.dumps(TALK)}]
    (feature,) = features_of(task_of("causal_lm", tokenizer, rows), rows).features
    aimed = [t for t, label in zip(feature["input_ids"], feature["labels"], strict=True) if label != IGNORED]
    text = tokenizer.decode(aimed)
    assert "It jumps." in text
    assert "It is lazy." in text
    assert "fox" not in text
    assert "dog" not in text


def test_t21_an_example_without_a_target_is_an_error_that_shows_it(monkeypatch):
    """No template that is accepted leads there, so the parts are marked wrong by hand."""
    rows = [{"text": "Why is the fox red?", "label": "It jumps."}]
    task = task_of("causal_lm", gpt2_like(), rows)
    parts = task.prompts.parts
    monkeypatch.setattr(task.prompts, "parts", lambda messages: [(text, False) for text, _ in parts(messages)])
    with pytest.raises(DataError, match=r"line 2: no token of this example is a target") as error:
        features_of(task, rows)
    assert "Why is the fox red?" in str(error.value)
    assert "It jumps." in str(error.value)


@pytest.mark.parametrize("name", ["SHOUTS", "FORGETS", "SPELLS"])
def test_t21_a_template_that_cannot_be_followed_is_shown(name):
    tokenizer = gpt2_like()
    tokenizer.chat_template = getattr(chat_templates, name)
    rows = [{"text": json.dumps(TALK)}]
    with pytest.raises((ConfigError, DataError), match="It renders\n") as error:
        features_of(task_of("causal_lm", tokenizer, rows), rows)
    assert "<|im_start|>" in str(error.value)
