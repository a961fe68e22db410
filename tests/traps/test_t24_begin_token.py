"""T24: a begin token stands once, in front, whether tokenizer, template, both or neither put one; never before an answer."""

from __future__ import annotations

import json

import chat_templates
import pytest
from language_bases import features_of, llama_like, task_of

from afina.errors import DataError

TWICE = "{{ bos_token }}" + chat_templates.ENDS
ROWS = [{"text": "Why is the fox red?", "label": "It jumps."}]


@pytest.mark.parametrize("tokenizer_begins", [True, False])
@pytest.mark.parametrize(
    ("template", "begins"), [(chat_templates.ENDS, True), (TWICE, True), (chat_templates.NAMES, False), (None, False)]
)
def test_t24_one_begin_token_or_none(tokenizer_begins, template, begins):
    tokenizer = llama_like(begins=tokenizer_begins)
    tokenizer.chat_template = template
    task = task_of("causal_lm", tokenizer, ROWS)
    question = [{"text": ROWS[0]["text"]}]
    for feature in (*features_of(task, ROWS).features, *features_of(task, question).features):
        ids, begin = feature["input_ids"], tokenizer.bos_token_id
        assert ids.count(begin) == int(begins or tokenizer_begins)
        assert (ids[0] == begin) == (begins or tokenizer_begins)


def test_t24_a_template_may_begin_every_question_but_no_answer():
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}] * 2
    rows = [{"text": json.dumps(talk)}]
    tokenizer = llama_like()
    tokenizer.chat_template = chat_templates.INST
    (feature,) = features_of(task_of("causal_lm", tokenizer, rows), rows).features
    places = [i for i, token in enumerate(feature["input_ids"]) if token == tokenizer.bos_token_id]
    assert places[0] == 0
    assert len(places) == 2
    assert "[INST]" in tokenizer.decode(feature["input_ids"][places[1] :][:9])
    tokenizer.chat_template = chat_templates.BEGINS_ANSWERS
    with pytest.raises(DataError, match=r"'<s>' between a question and its answer \(T24\)"):
        features_of(task_of("causal_lm", tokenizer, rows), rows)


def test_t24_pieces_of_a_text_begin_once():
    rows = [{"text": "the quick brown fox jumps over 13 lazy dogs! " * 9}]
    tokenizer = llama_like()
    features = features_of(task_of("causal_lm", tokenizer, rows), rows, length=17).features
    assert len(features) > 3
    assert [feature["input_ids"].count(tokenizer.bos_token_id) for feature in features] == [1, *[0] * (len(features) - 1)]


def test_t24_the_answer_is_tokenised_without_a_begin_token():
    """Also by a tokenizer that puts one even where it is asked not to."""
    tokenizer = llama_like()

    class Stubborn(type(tokenizer)):
        def __call__(self, text, **kwargs):
            return super().__call__(text, **{**kwargs, "add_special_tokens": True})

    expected = features_of(task_of("causal_lm", llama_like(), ROWS), ROWS).features
    tokenizer.__class__ = Stubborn
    assert tokenizer("a", add_special_tokens=False)["input_ids"][0] == tokenizer.bos_token_id
    assert features_of(task_of("causal_lm", tokenizer, ROWS), ROWS).features == expected
