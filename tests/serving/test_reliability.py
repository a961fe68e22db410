"""Limits, time, clients that go away, errors inside, the end: nobody's work is lost or kept for nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time

import httpx
import pytest
from serving_runs import running

from afina.serving import door, writing
from afina.serving.app import make_app
from afina.serving.engine import Engine, Reading
from afina.serving.limits import Limits

READ = {"model": "two", "input": "w1 late"}
LONG = {"model": "llama", "prompt": "red fruits", "max_tokens": 100}


@contextlib.contextmanager
def slow(monkeypatch, seconds):
    """Every step of a text takes so long more."""
    step = writing.Cohort.step

    def slower(self):
        time.sleep(seconds)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Cohort, "step", slower)
        yield


def figures(address, name):
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and not line.startswith("#"))


def settled(address, name="afina_requests_inside", value=0.0, seconds=5.0):
    until = time.monotonic() + seconds
    while figures(address, name) != value:
        assert time.monotonic() < until, figures(address, name)
        time.sleep(0.02)


def test_the_key_is_asked_for_everywhere_but_at_health(models):
    with running(make_app(models, Limits(api_key="sesame"))) as address:
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(address + path).status_code == 401
        for given in (None, "sesame", "Bearer", "Bearer sesam", "Bearer sesame1", "Basic sesame", "Bearer ünïcode"):
            headers = [(b"authorization", given.encode())] if given else []
            answer = httpx.post(address + "/classify", json=READ, headers=headers)
            assert answer.status_code == 401, given
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "sesame" not in answer.text
        assert httpx.post(address + "/classify", json=READ, headers={"authorization": "Bearer sesame"}).status_code == 200
        assert httpx.get(address + "/health").status_code == 200


def test_when_full_the_next_is_told_when_to_come_back(models, monkeypatch):
    with slow(monkeypatch, 0.05), running(make_app(models, Limits(queue=3))) as address:
        with httpx.Client() as client, contextlib.ExitStack() as open_streams:
            for _ in range(3):
                asked = client.stream("POST", f"{address}/v1/completions", json={**LONG, "stream": True})
                stream = open_streams.enter_context(asked)
                assert stream.status_code == 200
            refused = httpx.post(address + "/classify", json=READ)
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert httpx.get(address + "/health").status_code == 200  # asked all the same
        settled(address)
        assert httpx.post(address + "/classify", json=READ).status_code == 200


def test_out_of_time_the_work_is_dropped(models, monkeypatch):
    with slow(monkeypatch, 0.05), running(make_app(models, Limits(timeout=0.4))) as address:
        before = time.monotonic()
        answer = httpx.post(f"{address}/v1/completions", json=LONG)
        assert answer.status_code == 504
        assert "--timeout" in answer.json()["error"]["message"]
        assert time.monotonic() - before < 2
        with httpx.stream("POST", f"{address}/v1/completions", json={**LONG, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("data: {")]
        assert json.loads(lines[-1][6:])["error"]["type"] == "timeout_error"
        time.sleep(0.2)
        steps = figures(address, "afina_batch_rows_count")
        time.sleep(0.3)
        assert figures(address, "afina_batch_rows_count") == steps  # nothing is computed any more


def test_a_body_that_does_not_come_is_not_waited_for(models):
    with running(make_app(models, Limits(timeout=0.3))) as address:
        host, port = address.removeprefix("http://").split(":")

        async def ask():
            reader, writer = await asyncio.open_connection(host, int(port))
            lines = ["POST /classify HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 50", "", "{"]
            writer.write("\r\n".join(lines).encode())
            said = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
            writer.close()
            return said

        assert b"408" in asyncio.run(ask())
        settled(address)


@pytest.mark.parametrize("body", [b"no JSON", json.dumps(READ).encode()])
def test_who_does_not_take_the_answer_keeps_no_place(models, monkeypatch, body):
    monkeypatch.setattr(door, "_GRACE", 0.2)
    app = make_app(models, Limits(timeout=0.2))
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/classify", "headers": headers, "query_string": b"", "root_path": ""}
    parts = [{"type": "http.request", "body": body}]

    async def receive():
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message):
        await asyncio.Event().wait()

    async def ask():
        asked = asyncio.ensure_future(app(scope, receive, send))
        await asyncio.sleep(0.05)
        assert app.inside == 1
        await asyncio.wait_for(asked, 5)
        assert app.inside == 0

    asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_leaves_no_work_behind(models, monkeypatch, stream):
    with slow(monkeypatch, 0.05), running(make_app(models, Limits())) as address:
        asked = httpx.stream("POST", f"{address}/v1/completions", json={**LONG, "stream": stream}, timeout=0.3)
        with contextlib.suppress(httpx.ReadTimeout), asked as answer:
            assert stream
            assert next(answer.iter_lines())
        assert figures(address, "afina_batch_rows_count") < 60  # of a hundred
        settled(address)
        time.sleep(0.1)
        steps = figures(address, "afina_batch_rows_count")
        time.sleep(0.3)
        assert figures(address, "afina_batch_rows_count") == steps


def test_an_error_inside_is_one_requests_own(models, monkeypatch, caplog):
    served = models.by_name["two"]
    answers = type(served.task).answers

    def broken(self, model, batch):
        if self is served.task:
            raise IndexError("a secret of the inside")
        return answers(self, model, batch)

    with running(make_app(models, Limits())) as address:
        with monkeypatch.context() as patch:
            patch.setattr(type(served.task), "answers", broken)
            results = {}

            def ask(name, number):
                asked = {"model": name, "input": "w1 late"}
                results[name, number] = httpx.post(f"{address}/classify", json=asked, timeout=30)

            threads = [threading.Thread(target=ask, args=(name, i)) for name in ("two", "three") for i in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for (name, _), answer in results.items():
            assert answer.status_code == (500 if name == "two" else 200), answer.text
        failed = results["two", 0]
        assert "secret" not in failed.text
        assert failed.headers["x-request-id"] in failed.json()["error"]["message"]
        assert any(failed.headers["x-request-id"] in record.getMessage() for record in caplog.records)
        assert httpx.post(address + "/classify", json=READ).status_code == 200


def test_an_error_while_a_text_is_written_is_told_and_the_next_is_written(models, monkeypatch, caplog):
    step, left = writing.Cohort.step, [3]

    def breaks(self):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("broken")
        step(self)

    with running(make_app(models, Limits())) as address:
        for stream in (False, True):
            left[0] = 3
            with monkeypatch.context() as patch:
                patch.setattr(writing.Cohort, "step", breaks)
                answer = httpx.post(f"{address}/v1/completions", json={**LONG, "stream": stream}, timeout=30)
            if stream:
                assert answer.status_code == 200
                assert '"type": "server_error"' in answer.text.splitlines()[-4] + answer.text.splitlines()[-3]
            else:
                assert answer.status_code == 500
            assert httpx.post(f"{address}/v1/completions", json={**LONG, "max_tokens": 2}).status_code == 200


def test_scores_that_are_no_numbers_are_an_error_and_no_text(models, monkeypatch, caplog):
    scores = writing.Cohort._scores

    def nan(self, ids):
        made = scores(self, ids).clone()
        made[0] = float("nan")
        return made

    with running(make_app(models, Limits())) as address, monkeypatch.context() as patch:
        patch.setattr(writing.Cohort, "_scores", nan)
        answer = httpx.post(f"{address}/v1/completions", json=LONG, timeout=30)
        assert answer.status_code == 500
        assert "FloatingPointError" in answer.json()["error"]["message"]


def test_the_end_finishes_what_runs(models, monkeypatch):
    answers = []
    with slow(monkeypatch, 0.01):
        with running(make_app(models, Limits())) as address:
            ask = lambda: answers.append(httpx.post(f"{address}/v1/completions", json=LONG, timeout=30))
            threads = [threading.Thread(target=ask) for _ in range(3)]
            for thread in threads:
                thread.start()
            settled(address, value=3.0)
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [200] * 3
    with pytest.raises(httpx.ConnectError):
        httpx.get(address + "/health")


def test_the_engine_drops_what_was_cancelled_before_it_began(models):
    engine = Engine(models, Limits())
    served = models.by_name["two"]
    (feature,) = served.task.encode(served.run.asked([{"text": "w1"}]), None, 61).features
    jobs = [Reading(served, [feature]) for _ in range(3)]
    jobs[1].cancelled = True
    engine.submit(jobs)
    assert engine.waiting == 3
    engine.start()
    assert len(jobs[0].answers.result(10)) == len(jobs[2].answers.result(10)) == 1
    engine.close()
    assert not jobs[1].answers.done()
    assert not engine.alive


def test_memory_does_not_grow_with_requests(models):
    """What is alive after some requests is what is alive after many."""
    import gc

    import torch

    def alive():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    with running(make_app(models, Limits())) as address, httpx.Client(timeout=30) as client:

        def ask(count):
            for i in range(count):
                asked = {"model": ["two", "three"][i % 2], "input": f"w{i % 9}"}
                assert client.post(address + "/classify", json=asked).is_success
                if i % 5 == 0:
                    asked = {"model": "first", "messages": [{"role": "user", "content": f"red {i}"}], "max_tokens": 3}
                    assert client.post(address + "/v1/chat/completions", json=asked).is_success

        ask(20)
        before = alive()
        ask(60)
        assert alive() <= before + 5
