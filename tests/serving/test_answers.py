"""What the server answers is what `afina predict` answers, whoever asks at the same time; the real clients understand it."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import re
import shutil
import struct
import time
from pathlib import Path

import httpx
import openai
import pytest
from serving_runs import conversations, running, texts

from afina.serving.app import make_app
from afina.serving.limits import Limits
from afina.serving.models import load_models
from afina.serving.trial import try_out
from afina.training.trained import TrainedRun


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def predicted(encoders, writers):
    """What `afina predict` says, as JSON."""
    loaded = {}

    def predict(name, rows):
        if name not in loaded:
            loaded[name] = TrainedRun.load({**encoders, **writers}[name])
        run = loaded[name]
        examples = run.asked(rows)
        return [run.task.respond(a, e) for a, e in zip(run.answers(examples), examples, strict=True)]

    return predict


def close(found, right):
    if isinstance(right, dict):
        return set(found) == set(right) and all(close(found[key], right[key]) for key in right)
    if isinstance(right, list):
        return len(found) == len(right) and all(map(close, found, right))
    return abs(found - right) <= 1e-5 * max(1, abs(right)) if isinstance(right, float) else found == right


def inputs(name, count=5):
    found = [text for text, _ in texts(count, 71)]
    if name == "spans":
        return [{"text": f"where {text.split()[0]}", "text_pair": text} for text in found]
    if name == "alike":
        return [{"text": a, "text_pair": b} for a, b in zip(found, reversed(found), strict=True)]
    return [{"text": text} for text in found]


KINDS = ["two", "three", "number", "several", "prompted", "blocks", "tags", "spans", "alike"]


def test_classify_answers_as_predict_while_all_others_are_asked(address, predicted):
    right = {name: predicted(name, inputs(name)) for name in KINDS}

    def ask(number):
        name, row = KINDS[number % len(KINDS)], number // len(KINDS) % 5
        given = inputs(name)
        asked = given if number % 4 == 0 else given[row]
        said = httpx.post(f"{address}/classify", json={"model": name, "input": asked}, timeout=60)
        assert said.status_code == 200, said.text
        made = [{k: v for k, v in one.items() if k != "index"} for one in said.json()["data"]]
        wanted = right[name] if number % 4 == 0 else [right[name][row]]
        assert close(made, wanted), (name, made, wanted)
        return len(made)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(ask, range(135))) > 135


def test_question_and_context_are_names_of_the_two_texts(address):
    row = inputs("spans")[0]
    named = {"question": row["text"], "context": row["text_pair"]}
    said = [httpx.post(f"{address}/classify", json={"model": "spans", "input": i}).json()["data"] for i in (row, named)]
    assert said[0] == said[1]


def test_words_may_be_given_as_a_list(address):
    words = texts(1, 3)[0][0].split()
    made = [httpx.post(f"{address}/classify", json={"model": "tags", "input": i}).json()["data"][0]
            for i in ({"text": words}, " ".join(words))]  # fmt: skip
    assert made[0]["words"] == words
    assert made[0]["tags"] == made[1]["tags"]


def test_vectors_are_those_of_predict_in_both_encodings(client, predicted):
    rows = inputs("two")
    right = [one["vector"] for one in predicted("alike", rows)]
    made = client.embeddings.create(model="alike", input=[row["text"] for row in rows])  # base64, which the client decodes
    plain = client.embeddings.create(model="alike", input=[row["text"] for row in rows], encoding_format="float")
    assert [one.index for one in made.data] == list(range(len(rows)))
    for one, other, wanted in zip(made.data, plain.data, right, strict=True):
        assert one.embedding == pytest.approx(wanted, abs=1e-5)
        assert one.embedding == pytest.approx(other.embedding, abs=1e-7)
    assert made.usage.prompt_tokens == sum(len(row["text"].split()) + 2 for row in rows)
    raw = client.embeddings.with_raw_response.create(model="alike", input="w1", encoding_format="base64")
    coded = raw.http_response.json()["data"][0]["embedding"]
    assert len(struct.unpack("<24f", base64.b64decode(coded))) == 24


def questions(seed=3, count=6):
    return [row["instruction"] for row in conversations(seed, count)]


def chat(client, model, text, **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def test_chat_is_greedy_and_as_predict_while_others_are_asked(client, predicted):
    asked = questions()
    right = {name: [a["answer"] for a in predicted(name, [{"text": q} for q in asked])] for name in ("first", "second")}
    assert any(a != b for a, b in zip(right["first"], right["second"], strict=True))

    def ask(number):
        name, which = ("first", "second")[number % 2], number // 2 % len(asked)
        if number % 3:
            made = chat(client, name, asked[which])
            assert made.choices[0].message.content == right[name][which]
            return made.usage.completion_tokens
        pieces = list(chat(client, name, asked[which], stream=True))
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == right[name][which]
        assert pieces[0].choices[0].delta.role == "assistant"
        assert [p.choices[0].finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        return pieces[-1].choices[0].finish_reason in ("stop", "length")

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(48)))


def test_completions_answer_as_predict_for_running_text_and_for_sources(client, predicted):
    asked = questions(4)
    for name in ("running", "source"):
        right = [a["answer"] for a in predicted(name, [{"text": q} for q in asked])]
        made = client.completions.create(model=name, prompt=asked)
        assert [c.text.strip() for c in made.choices] == right
        assert [c.index for c in made.choices] == list(range(len(asked)))
        streamed = [""] * len(asked)
        for piece in client.completions.create(model=name, prompt=asked, stream=True):
            streamed[piece.choices[0].index] += piece.choices[0].text
        assert streamed == [c.text for c in made.choices]


def test_the_base_answers_without_any_adapter(client, models):
    served = models.by_name["llama"]
    prompt = questions()[0]
    made = client.completions.create(model="llama", prompt=prompt, max_tokens=7)
    ids = served.task.tokenizer(prompt, return_tensors="pt")
    with served.lane.model.disable_adapter():
        written = served.lane.model.generate(**ids, max_new_tokens=7, do_sample=False, eos_token_id=[2])
    new = written[0, ids["input_ids"].shape[1] :]
    assert made.choices[0].text == served.task.tokenizer.decode(new, skip_special_tokens=True)


def test_max_tokens_stop_and_why_it_ended(client):
    whole = chat(client, "first", questions()[0], max_tokens=12)
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == 12 + whole.usage.prompt_tokens
    short = chat(client, "first", questions()[0], max_completion_tokens=3)
    assert short.usage.completion_tokens == 3
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    for stream in (False, True):
        made = chat(client, "first", questions()[0], max_tokens=12, stop=["never there", middle], stream=stream)
        pieces = list(made) if stream else [made]
        said = "".join((p.choices[0].delta if stream else p.choices[0].message).content or "" for p in pieces)
        assert said == text[: text.index(middle)].rstrip()
        assert pieces[-1].choices[0].finish_reason == "stop"


def test_usage_comes_last_in_a_stream_where_it_is_asked_for(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(chat(client, "first", "red fruits", max_tokens=5, n=2, **options))
    assert pieces[-1].choices == []
    whole = chat(client, "first", "red fruits", max_tokens=5, n=2).usage
    assert pieces[-1].usage.model_dump() == whole.model_dump()
    assert all(piece.usage is None for piece in pieces[:-1])


def test_a_seed_gives_the_same_text_whatever_it_is_computed_with(client):
    options = {"temperature": 1.5, "seed": 17, "max_tokens": 11}
    alone = chat(client, "first", questions()[1], **options).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        others = [pool.submit(chat, client, "second", q, temperature=1.9, max_tokens=13) for q in questions(9)]
        again = [pool.submit(chat, client, "first", questions()[1], **options) for _ in range(3)]
        assert {made.result().choices[0].message.content for made in again} == {alone}
        assert all(made.result() for made in others)
    several = chat(client, "first", questions()[1], n=5, **options).choices
    assert several[0].message.content == alone
    assert len({one.message.content for one in several}) > 1
    assert chat(client, "first", questions()[1], temperature=1.5, top_p=1e-9, max_tokens=11).choices[0].message.content == (
        chat(client, "first", questions()[1], max_tokens=11).choices[0].message.content
    )
    assert chat(client, "first", questions()[1], temperature=1.5, extra_body={"top_k": 1}, max_tokens=11).choices[
        0
    ].message.content == (chat(client, "first", questions()[1], max_tokens=11).choices[0].message.content)


def test_a_long_text_holds_up_no_short_one(client):
    over = {}

    def ask(name, tokens):
        made = client.completions.create(model=name, prompt="red fruits", max_tokens=tokens)
        over[tokens] = time.monotonic()
        return made.usage.completion_tokens

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, "llama", 113)
        time.sleep(0.03)
        began = time.monotonic()
        assert pool.submit(ask, "first", 2).result(30) == 2
        assert long.result(30) > 50
    assert over[2] - began < (over[113] - began) / 2


def test_conversations_and_lists_of_parts(client, models):
    turns = [
        {"role": "system", "content": "small"},
        {"role": "user", "content": "red dogs"},
        {"role": "assistant", "content": "quick"},
        {"role": "user", "content": [{"type": "text", "text": "brown "}, {"type": "text", "text": "fox"}]},
    ]
    made = client.chat.completions.create(model="first", messages=turns, max_tokens=1)
    task = models.by_name["first"].task
    flat = [*turns[:3], {"role": "user", "content": "brown fox"}]
    ids = task.tokenizer.apply_chat_template(flat, add_generation_prompt=True)["input_ids"]
    assert made.usage.prompt_tokens == 1 + len(ids)  # and the begin token


def test_what_there_is_to_be_asked(client, address):
    listed = {one.id: one for one in client.models.list().data}
    assert {"two", "alike", "first", "llama", "t5"} <= set(listed)
    assert client.models.retrieve("first").model_dump()["adapter"] is True
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    chat(client, "first", questions(count=1)[0], max_tokens=2)
    told = httpx.get(f"{address}/metrics").text
    assert 'afina_requests_total{model="first",path="/v1/chat/completions",status="200"}' in told
    assert 'afina_tokens_total{kind="completion",model="first"}' in told
    counts = {line.split()[0]: float(line.split()[1]) for line in told.splitlines() if line.startswith("afina_batch")}
    assert counts["afina_batch_adapters_count"] >= counts['afina_batch_adapters_bucket{le="1.0"}'] > 0
    assert json.loads(httpx.get(f"{address}/openapi.json").text)["paths"]["/classify"]["post"]["requestBody"]["required"]


def test_a_run_of_several_beams_answers_as_predict_in_one_call(writers, tmp_path):
    folder = shutil.copytree(writers["source"], tmp_path / "beams")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["task"]["options"]["num_beams"] = 3
    (folder / "metrics.json").write_text(json.dumps(metrics))
    made = load_models({"beams": folder})
    try_out(made)
    assert made.by_name["beams"].whole
    assert any("num_beams" in note for note in made.notes)
    run = TrainedRun.load(folder)
    asked = questions(4)
    right = [a.text for a in run.answers(run.asked([{"text": q} for q in asked]))]
    with running(make_app(made, Limits())) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        assert [c.text for c in client.completions.create(model="beams", prompt=asked).choices] == right
        streamed = client.completions.create(model="beams", prompt=asked[0], stream=True)
        assert "".join(piece.choices[0].text for piece in streamed) == right[0]
        with pytest.raises(openai.BadRequestError, match="no temperature"):
            client.completions.create(model="beams", prompt=asked[0], temperature=1.0)


def test_what_the_document_shows_can_be_done(address):
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    names = {"http://127.0.0.1:8000": address, 'model="chat"': 'model="first"', 'model="similar"': 'model="alike"'}
    for shown, ours in names.items():
        assert shown in code
        code = code.replace(shown, ours)
    found = {}
    exec(code, found)
    assert len(found["vectors"]) == 2
    command = re.search(r"^```sh\n(curl .*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    url, header, data = re.search(r"curl (\S+) -H '(.*?)'.*-d '(.*?)'", command, re.DOTALL).groups()
    body = {**json.loads(data), "model": "two"}
    answer = httpx.post(url.replace("http://127.0.0.1:8000", address), json=body, headers=[tuple(header.split(": "))])
    shown = json.loads(re.search(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1])
    assert set(answer.json()) == set(shown)
    assert [set(one) for one in answer.json()["data"]] == [set(one) for one in shown["data"]]
    paths = set(re.findall(r"`(/[a-z0-9/_]+)`", text))
    known = set(httpx.get(f"{address}/openapi.json").json()["paths"])
    assert {"/v1/completions", "/classify", "/metrics"} <= paths <= known


def test_every_option_of_the_command_is_in_the_document():
    from typer.main import get_command

    from afina.cli.main import app

    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    options = {o for p in get_command(app).commands["serve"].params for o in p.opts if o.startswith("--")}
    assert {o for o in options if f"`{o}" not in text and f" {o}" not in text} <= {"--host", "--port"}
    assert set(re.findall(r"`(--[a-z-]+)", text)) - options <= {"--max-lora-rank", "--dtype"}
