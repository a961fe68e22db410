"""`afina serve` as a process: what it shows, how it begins and ends, what it says of wrong options."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest


def start(*words, **settings):
    command = [sys.executable, "-m", "afina", "serve", *map(str, words)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **settings}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_it_shows_what_can_be_asked_and_stops_when_told(encoders):
    process = start(f"spam={encoders['two']}", encoders["alike"], "--port", 0, "--threads", 1, AFINA_API_KEY="sesame")
    shown = []
    for line in process.stdout:
        shown.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    text = "".join(shown)
    assert re.search(r"spam +sequence_classification +bert \(1\) +/classify\n", text)
    assert re.search(r"alike +sentence_similarity +bert \(2\) +/v1/embeddings, /classify\n", text)
    assert re.search(r"bert +sentence_similarity +bert \(2\) +/v1/embeddings\n", text)
    asked = {"model": "spam", "input": "w1 late"}
    assert httpx.post(f"{found[0]}/classify", json=asked).status_code == 401
    answer = httpx.post(f"{found[0]}/classify", json=asked, headers={"authorization": "Bearer sesame"})
    assert set(answer.json()["data"][0]["probabilities"]) == {"complaint", "other"}
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert out == "stopped\n"
    assert process.returncode == 0
    assert "Traceback" not in err


@pytest.fixture
def afina(capsys, monkeypatch):
    def run(*words):
        from afina.cli.main import main

        monkeypatch.setattr(sys, "argv", ["afina", "serve", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code
        return capsys.readouterr().err

    return run


def test_wrong_options_are_told_before_anything_is_loaded(afina, encoders, tmp_path):
    two = encoders["two"]
    said = afina(two, "--max-body", "much", "--api-key", " ")
    assert "2 problems" in said
    assert "--max-body: 'much' is no amount" in said
    assert "--api-key" in said
    assert "two runs are called 'two'" in afina(two, two)
    assert "there is no run folder" in afina(tmp_path / "none")
    assert "is no finished run" in afina(tmp_path)
    assert "--host" in afina(two, "--host", "no.such.host.invalid")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = afina(two, "--port", taken.getsockname()[1])
    assert "Address already in use; take another with --port, or 0" in said


def test_vllm_prints_a_command_or_what_stands_against_it(afina, writers, capsys, monkeypatch):
    from afina.cli.main import main

    monkeypatch.setattr(sys, "argv", ["afina", "serve", str(writers["first"]), "--vllm", "--port", "9000"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (0, None)
    said = capsys.readouterr().out
    assert said.startswith("vllm serve ")
    assert f"first={writers['first'] / 'adapter'}" in said
    assert "peft_type is IA3" in afina(writers["second"], "--vllm")
