"""`afina train --processes 2`: one message, the right exit code and no hang, whatever ends one of the processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_bases import save_bert, write_rows

from afina.cli.launch import are_to_be_started, command_again
from afina.errors import ConfigError

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    base, rows = save_bert(folder / "base"), write_rows(folder / "rows.csv", 59)
    return ["train", "--data", str(rows), "--label", "label", "--model", str(base), "--output", str(folder / "run"),
            "--processes", "2", "--quiet"]  # fmt: skip


def started(words):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    return subprocess.Popen([sys.executable, "-m", "afina", *words], env=environment, **streams)


def last_step(words):
    """The last step that the log of the run holds."""
    log = Path(words[words.index("--output") + 1]) / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def reached(words, step, process):
    """Wait until the run has made the step."""
    latest = time.monotonic() + 120
    while last_step(words) < step:
        assert time.monotonic() < latest
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_t40_what_is_wrong_is_said_once(words):
    with started([*words, "--text", "mesage"]) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.count("Error") == 1
    assert "Did you mean 'message'" in said


def test_a_signal_stops_all_and_a_killed_one_ends_all(words):
    with started([*words, "--text", "message", "--epochs", "999", "--engine", "fsdp2"]) as process:
        reached(words, 3, process)
        loaded = [region.path for region in psutil.Process(process.pid).memory_maps()]
        assert not any("libtorch" in path for path in loaded)  # the launcher itself waits without it
        process.send_signal(signal.SIGTERM)
        shown, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "2, fsdp2: weights, gradients and optimizer in shards; of the 16 rows of a step each computes 8" in shown
    assert "a checkpoint is written" in said
    assert "afina train --processes 2 --resume --output" in said
    assert "rror" not in said

    stopped = last_step(words)
    with started([words[0], *words[words.index("--output") :], "--resume"]) as process:
        reached(words, stopped + 3, process)
        second = next(c for c in psutil.Process(process.pid).children() if c.environ()["RANK"] == "1")
        second.kill()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 137
    assert "process 1 of 2 was ended from outside by SIGKILL" in said
    assert "Traceback" not in said


def test_the_number_of_another_launcher_counts(monkeypatch):
    assert are_to_be_started(2)
    assert not are_to_be_started(1)
    assert command_again("runs/a b") == "afina train --resume --output 'runs/a b'"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not are_to_be_started(2)
    assert command_again("runs/a") == "torchrun --nproc-per-node 2 -m afina train --resume --output runs/a"
    with pytest.raises(ConfigError, match="--processes 3: a launcher has started 2 already"):
        are_to_be_started(3)
