"""Whatever is sent, the answer is a 4xx with a reason in OpenAI's form, and the server goes on."""

from __future__ import annotations

import json

import httpx
import pytest

CHAT = {"model": "first", "messages": [{"role": "user", "content": "red"}], "max_tokens": 2}
CHAT_PATH, WRITE_PATH, READ_PATH, VECTOR_PATH = "/v1/chat/completions", "/v1/completions", "/classify", "/v1/embeddings"
PAIR = {"text": "a", "text_pair": "b"}
LONG = {"question": "w1 " * 90, "context": "w1"}


def body(**changes):
    return {**CHAT, **changes}


def said(role, content):
    return body(messages=[{"role": role, "content": content}])


WRONG = {  # what is wrong -> path, body, status, a word of the reason
    "temperature as text": (CHAT_PATH, body(temperature="hot"), 400, "temperature"),
    "temperature too high": (CHAT_PATH, body(temperature=2.1), 400, "temperature=2.1"),
    "temperature true": (CHAT_PATH, body(temperature=True), 400, "temperature"),
    "negative max_tokens": (CHAT_PATH, body(max_tokens=-1), 400, "max_tokens=-1"),
    "max_tokens zero": (CHAT_PATH, body(max_tokens=0), 400, "greater than or equal to 1"),
    "max_tokens a fraction": (CHAT_PATH, body(max_tokens=1.5), 400, "max_tokens"),
    "max_tokens beyond the model": (CHAT_PATH, body(max_tokens=10**9), 400, "takes 127"),
    "huge n": (CHAT_PATH, body(n=10**6), 400, "n=1000000"),
    "n zero": (CHAT_PATH, body(n=0), 400, "n=0"),
    "top_p zero": (CHAT_PATH, body(top_p=0), 400, "top_p"),
    "seed beyond 64 bits": (CHAT_PATH, body(seed=2**64), 400, "seed"),
    "five stops": (CHAT_PATH, body(stop=list("abcde")), 400, "at most 4"),
    "an empty stop": (CHAT_PATH, body(stop=""), 400, "empty"),
    "no model": (CHAT_PATH, {"messages": CHAT["messages"]}, 400, "model is missing"),
    "model a number": (CHAT_PATH, body(model=3), 400, "model"),
    "an unknown model": (CHAT_PATH, body(model="frist"), 404, "Did you mean 'first'"),
    "no messages": (CHAT_PATH, body(messages=[]), 400, "messages"),
    "messages as text": (CHAT_PATH, body(messages="red"), 400, "messages: expected a list"),
    "a message without role": (CHAT_PATH, body(messages=[{"content": "red"}]), 400, "messages[0]"),
    "an unknown role": (CHAT_PATH, said("wizard", "red"), 400, '"assistant"'),
    "a tool's message": (CHAT_PATH, said("tool", "red"), 400, "messages[0]"),
    "content null": (CHAT_PATH, said("user", None), 400, "messages[0]"),
    "an empty content": (CHAT_PATH, said("user", " \n "), 400, "messages[0].content is empty"),
    "an image": (CHAT_PATH, said("user", [{"type": "image_url", "image_url": {"url": "x"}}]), 400, "texts alone"),
    "the last word is the assistant's": (CHAT_PATH, said("assistant", "red"), 400, "expected one of the user"),
    "too long a conversation": (CHAT_PATH, said("user", "red fruits " * 99), 400, "takes 127 in all"),
    "half a surrogate pair": (CHAT_PATH, json.dumps(said("user", "\ud800")), 400, "surrogate"),
    "a field misspelled": (CHAT_PATH, body(temprature=1.0), 400, "Did you mean 'temperature'"),
    "tools": (CHAT_PATH, body(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "calls none"),
    "an answer in JSON": (CHAT_PATH, body(response_format={"type": "json_object"}), 400, "not enforced"),
    "logprobs": (CHAT_PATH, body(logprobs=True), 400, "probabilities of tokens"),
    "logprobs 1": (WRITE_PATH, {"model": "first", "prompt": "red", "logprobs": 1}, 400, "probabilities"),
    "logprobs 0, which asks too": (WRITE_PATH, {"model": "first", "prompt": "red", "logprobs": 0}, 400, "probabilities"),
    "logit_bias": (CHAT_PATH, body(logit_bias={"5": 1}), 400, "cannot be shifted"),
    "stream_options without stream": (CHAT_PATH, body(stream_options={"include_usage": True}), 400, "stream: true"),
    "two names of one limit": (CHAT_PATH, body(max_completion_tokens=3), 400, "give one"),
    "a classifier asked to chat": (CHAT_PATH, body(model="two"), 400, "ask /classify"),
    "vectors asked to chat": (CHAT_PATH, body(model="alike"), 400, "ask /v1/embeddings"),
    "a model without turns asked to chat": (CHAT_PATH, body(model="running"), 400, "/v1/completions"),
    "a reader of sources asked to chat": (CHAT_PATH, body(model="source"), 400, "/v1/completions"),
    "echo": (WRITE_PATH, {"model": "first", "prompt": "red", "echo": True}, 400, "prompt is not returned"),
    "suffix": (WRITE_PATH, {"model": "first", "prompt": "red", "suffix": "x"}, 400, "not filled in"),
    "best_of": (WRITE_PATH, {"model": "first", "prompt": "red", "best_of": 3}, 400, "with n"),
    "an empty prompt": (WRITE_PATH, {"model": "first", "prompt": ""}, 400, "prompt 0 is empty"),
    "no prompt at all": (WRITE_PATH, {"model": "first", "prompt": []}, 400, "prompt"),
    "token ids out of range": (WRITE_PATH, {"model": "first", "prompt": [1, 10**6]}, 400, "token ids from 0"),
    "negative token ids": (WRITE_PATH, {"model": "first", "prompt": [-1]}, 400, "token ids from 0"),
    "token ids for a reader of sources": (WRITE_PATH, {"model": "source", "prompt": [5, 6]}, 400, "not token ids"),
    "a classifier asked to write": (WRITE_PATH, {"model": "two", "prompt": "w1"}, 400, "ask /classify"),
    "a writer asked to classify": (READ_PATH, {"model": "first", "input": "red"}, 400, "/v1/chat/completions"),
    "an empty text": (READ_PATH, {"model": "two", "input": ["w1", " "]}, 400, "input[1].text is empty"),
    "no texts": (READ_PATH, {"model": "two", "input": []}, 400, "1 to 2048"),
    "too many texts": (READ_PATH, {"model": "two", "input": ["w"] * 2049}, 400, "1 to 2048"),
    "a number among the texts": (READ_PATH, {"model": "two", "input": ["w1", 5]}, 400, "input[1]: expected"),
    "too long a text": (READ_PATH, {"model": "two", "input": "w1 " * 300}, 400, '"truncate": true'),
    "a second text where none was trained": (READ_PATH, {"model": "two", "input": PAIR}, 400, "single texts"),
    "a second text of a task of one": (READ_PATH, {"model": "tags", "input": PAIR}, 400, "one text, not two"),
    "a question without its context": (READ_PATH, {"model": "spans", "input": {"question": "where w1"}}, 400, "go together"),
    "no context": (READ_PATH, {"model": "spans", "input": "where w1"}, 400, "text_pair is missing"),
    "one text to compare": (READ_PATH, {"model": "alike", "input": "w1"}, 400, "text and text_pair"),
    "a list of words for a classifier": (READ_PATH, {"model": "two", "input": {"text": ["a", "b"]}}, 400, "reads a text"),
    "a question longer than its windows": (READ_PATH, {"model": "spans", "input": LONG}, 400, "too short"),
    "vectors of a classifier": (VECTOR_PATH, {"model": "two", "input": "w1"}, 400, "makes no vectors"),
    "vectors of token ids": (VECTOR_PATH, {"model": "alike", "input": [1, 2]}, 400, "every model has its own"),
    "other dimensions": (VECTOR_PATH, {"model": "alike", "input": "w1", "dimensions": 7}, 400, "have 24"),
    "an unknown encoding": (VECTOR_PATH, {"model": "alike", "input": "w", "encoding_format": "hex"}, 400, "encoding_format"),
    "an empty text for a vector": (VECTOR_PATH, {"model": "alike", "input": ""}, 400, "empty"),
    "NaN": (CHAT_PATH, '{"model": "first", "temperature": NaN, "messages": []}', 400, "NaN is no JSON number"),
    "infinity": (CHAT_PATH, '{"model": "first", "temperature": -Infinity, "messages": []}', 400, "no JSON number"),
    "a number beyond all": (CHAT_PATH, json.dumps(body(temperature=77)).replace("77", "1e999"), 400, "temperature"),
    "a whole number of 5,000 digits": (CHAT_PATH, json.dumps(body(seed=77)).replace("77", "9" * 5000), 400, ""),
    "broken JSON": (CHAT_PATH, '{"model": "first",', 400, "not JSON"),
    "an empty body": (CHAT_PATH, "", 400, "not JSON"),
    "a list": (CHAT_PATH, "[1, 2]", 400, "a JSON list"),
    "null": (CHAT_PATH, "null", 400, "null"),
    "nested too deeply": (CHAT_PATH, '{"model": ' + "[" * 19000, 400, ""),
    "a body in another encoding": (CHAT_PATH, '{"model": "naïve"}'.encode("latin-1"), 400, "not UTF-8"),
    "too large a body": (CHAT_PATH, json.dumps(said("user", "r" * 50_000)), 413, "--max-body"),
}  # fmt: skip


def check_form(answer, status, word):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"], error["message"]
    assert len(error["message"]) > 10
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_with_a_reason(address, wrong):
    path, content, status, word = WRONG[wrong]
    content = content if isinstance(content, str | bytes) else json.dumps(content)
    answer = httpx.post(address + path, content=content, headers={"content-type": "application/json"}, timeout=30)
    check_form(answer, status, word)


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_other_content_types(address, kind):
    answer = httpx.post(address + CHAT_PATH, content=json.dumps(CHAT), headers={"content-type": kind} if kind else {})
    check_form(answer, 415, "expected application/json")
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    check_form(httpx.post(address + CHAT_PATH, content=b"x", headers=packed), 415, "compressed")


def test_other_paths_and_methods(address):
    check_form(httpx.post(address + "/v1/chat/completion", json=CHAT), 404, "/v1/chat/completions")
    check_form(httpx.get(address + "/v1/models/frist"), 404, "Did you mean 'first'")
    check_form(httpx.get(address + CHAT_PATH), 405, "Method Not Allowed")
    check_form(httpx.delete(address + "/v1/models"), 405, "")


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(address):
    sent = 0

    def parts():
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield b"x" * 10_000

    try:
        answer = httpx.post(address + CHAT_PATH, content=parts(), headers={"content-type": "application/json"}, timeout=30)
        check_form(answer, 413, "--max-body")
    except httpx.WriteError:  # the server had closed the connection already
        pass
    assert httpx.get(address + "/health").status_code == 200


def test_what_changes_no_answer_is_passed_over(address):
    idle = {"user": "me", "metadata": {}, "store": False, "logprobs": False, "tools": [], "stop": None, "seed": None,
            "stream_options": None, "response_format": {"type": "text"}}  # fmt: skip
    assert httpx.post(address + CHAT_PATH, json=body(**idle)).status_code == 200


def test_long_texts_are_cut_where_that_is_asked_for(address):
    answer = httpx.post(address + READ_PATH, json={"model": "two", "input": ["w1 " * 300, "w1"], "truncate": True}).json()
    assert answer["truncated"] == 1
    assert len(answer["data"]) == 2
    cut = httpx.post(address + VECTOR_PATH, json={"model": "alike", "input": "w1 " * 300, "truncate": True})
    assert cut.status_code == 200


def test_control_letters_and_all_of_unicode_are_text(address):
    odd = ["\x00", "\x1b[31m", "\ufeffw1", "ﷺ" * 20, "👩‍👩‍👧‍👦", "\u202ew1", "w1\r\n\tw2"]
    for text in odd:
        read = httpx.post(address + READ_PATH, json={"model": "two", "input": text})
        assert read.status_code == 200 or (read.status_code == 400 and "empty" in read.text), (text, read.text)
        chat = httpx.post(address + CHAT_PATH, json=said("user", text))
        assert chat.status_code == 200 or (chat.status_code == 400 and "empty" in chat.text), (text, chat.text)
