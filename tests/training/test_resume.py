"""T3: a run that was killed, stopped or out of disk goes on to the losses and weights of one that never was."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import fitted, prepared
from tiny_bases import save_bert, write_rows

from afina.errors import StoppedError, TrainingError
from afina.training import checkpoints
from afina.training.optimizers import OPTIMIZERS

# dropout on; checkpoints and evaluations fall within epochs, and on different steps
OPTIONS = {"epochs": 3, "batch_size": 5, "checkpoint_every": 3, "evaluate_every": 0.43, "keep_checkpoints": 2}
OPTIONS["method"] = {"name": "lora", "r": 3, "lora_dropout": 0.3}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    base = save_bert(folder / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}
    (base / "config.json").write_text(json.dumps(config))
    return str(base), str(write_rows(folder / "rows.csv", 73))


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """Log and weights of the run that never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    _, weights = fitted(prepared(places, output, **OPTIONS))
    return logged(output), weights


def logged(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def on(places, output, **options):
    run = prepared(places, output.parent / "unused", **{**OPTIONS, **options})
    run.output = output
    return run


def worker(places, output, how):
    command = [
        sys.executable,
        str(Path(__file__).with_name("resume_worker.py")),
        str(Path(places[0]).parent),
        str(output),
        how,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def same_as(whole, output, weights):
    assert logged(output) == whole[0]
    for name, value in whole[1].items():
        assert torch.equal(weights[name], value), name


def test_dropout_and_positions_matter_here(places, whole, tmp_path):
    """The comparison below could fail: another seed gives other losses."""
    fitted(prepared(places, tmp_path / "run", **{**OPTIONS, "seed": 1}))
    assert logged(tmp_path / "run")[3]["loss"] != whole[0][3]["loss"]
    assert len([line for line in whole[0] if "validation_loss" in line]) == 7


def test_t03_killed_at_random_and_resumed(places, whole, tmp_path):
    output, chance = tmp_path / "run", random.Random()
    moment = chance.randrange(1, 25)
    print("killed at step", moment)
    with worker(places, output, "start") as process:
        for line in process.stdout:
            if int(line) >= moment:
                break
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with (output / "log.jsonl").open("a") as file:
        file.write('{"step": 1')  # a line that was being written
    _, weights = fitted(on(places, output), resume=True)
    same_as(whole, output, weights)


@pytest.mark.parametrize("step", [0, 1, 4, 10, 22, 29])
def test_t03_from_any_step(places, whole, tmp_path, step):
    output = tmp_path / "run"

    def die(line):
        if line["step"] == step + 1:
            raise MemoryError

    with pytest.raises(MemoryError):
        fitted(on(places, output), die)
    for generator in (lambda: torch.manual_seed(9), lambda: np.random.seed(9), lambda: random.seed(9)):
        generator()
    _, weights = fitted(on(places, output), resume=True)
    same_as(whole, output, weights)


def test_from_every_checkpoint_that_is_kept(places, whole, tmp_path):
    output = tmp_path / "run"
    fitted(on(places, output, keep_checkpoints=99))
    steps = sorted(int(p.name.removeprefix("step-")) for p in (output / "checkpoints").iterdir())
    assert set(range(0, steps[-1], 3)) <= set(steps)
    for step in (steps[-2], 9, 0):  # each time from an earlier one, which drops the later ones
        _, weights = fitted(on(places, output, keep_checkpoints=99), resume=True, from_step=step)
        same_as(whole, output, weights)
        assert steps == sorted(int(p.name.removeprefix("step-")) for p in (output / "checkpoints").iterdir())
    with pytest.raises(TrainingError, match=r"--from-step 7: .* has those of step 0, 3"):
        fitted(on(places, output), resume=True, from_step=7)


def test_the_last_and_the_best_are_kept(places, tmp_path):
    result, _ = fitted(on(places, tmp_path / "run"))
    kept = {int(p.name.removeprefix("step-")) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    due = {s for s in range(result.steps + 1) if s % 3 == 0} | {
        line["step"] for line in logged(tmp_path / "run") if "best" in line
    }
    assert kept == {*sorted(due)[-2:], result.best_step}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(places, whole, tmp_path, number):
    output, before = tmp_path / "run", signal.getsignal(number)
    with pytest.raises(StoppedError, match="stopped after step 4 of") as error:
        fitted(on(places, output), lambda line: os.kill(os.getpid(), number) if line["step"] == 4 else None)
    assert error.value.signal == number
    assert signal.getsignal(number) is before
    assert checkpoints.latest(output / "checkpoints").name == "step-4"
    _, weights = fitted(on(places, output), resume=True)
    same_as(whole, output, weights)


@pytest.mark.parametrize("how", ["limit", "full"])
def test_a_full_disk_leaves_the_last_good_checkpoint(places, whole, tmp_path, how, monkeypatch):
    output, old = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(line):
        if line["step"] == 4 and how == "limit":  # the system itself refuses longer files
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, old[1]))
        elif line["step"] == 4:
            monkeypatch.setattr(torch, "save", full)

    try:
        with pytest.raises(TrainingError, match=r"step 5 could not be written .*step-3, is as it was") as error:
            fitted(on(places, output), fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert how == "limit" or "No space left on device" in str(error.value)
    assert not list((output / "checkpoints").glob(".*"))
    monkeypatch.undo()
    _, weights = fitted(on(places, output), resume=True)
    same_as(whole, output, weights)


def test_a_log_that_cannot_be_written_says_so(places, tmp_path, monkeypatch):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(TrainingError, match=r"log\.jsonl could not be written at step .*--resume"):
            fitted(
                on(places, tmp_path / "run", checkpoint_every=0, evaluate_every=9),
                lambda line: resource.setrlimit(resource.RLIMIT_FSIZE, (700, old[1])),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_other_rows_or_another_batch_size_are_refused_together(places, tmp_path):
    fitted(on(places, tmp_path / "run", epochs=1))
    with pytest.raises(TrainingError, match=r"training rows was .*batch_size was 5 and is 7.*optimizer was 'adamw'"):
        fitted(
            on((places[0], str(write_rows(tmp_path / "r.csv", 71))), tmp_path / "run", batch_size=7, optimizer="sgd"),
            resume=True,
        )


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("paged")])
def test_every_optimizer_resumes_bit_for_bit(places, tmp_path, name):
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    short = {"epochs": 1, "optimizer": name, "learning_rate": 1e-3}
    _, expected = fitted(on(places, tmp_path / "whole", **short))
    with pytest.raises(StoppedError):
        fitted(
            on(places, tmp_path / "run", **short),
            lambda n: os.kill(os.getpid(), 15) if n["step"] == 4 and "loss" in n else None,
        )
    _, weights = fitted(on(places, tmp_path / "run", **short), resume=True)
    same_as((logged(tmp_path / "whole"), expected), tmp_path / "run", weights)


def test_the_command_leaves_with_the_signals_code_and_says_how_to_go_on(places, tmp_path):
    output = tmp_path / "a run"
    words = ["afina", "train", "--data", places[1], "--text", "message", "--label", "label", "--model", places[0],
             "--output", str(output), "--epochs", "999"]  # fmt: skip
    code = f"import sys; sys.argv = {words!r}; from afina.cli.main import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", code], **streams) as process:
        for line in process.stdout:
            if line.startswith("  epoch 2"):
                process.send_signal(signal.SIGTERM)
                break
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert f"afina train --resume --output '{output}'" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("links", [True, False], ids=["linked", "written"])
def test_the_best_weights_are_whole_where_they_are_those_of_the_step(tmp_path, monkeypatch, links):
    """Also once the checkpoint that they came with is gone, and on disks that know no second name of a file."""

    def refused(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    weights = {step: {"weight": torch.full((3, 5), float(step))} for step in (1, 2, 3)}
    for step, best in ((1, 1), (2, 1), (3, 3)):
        checkpoints.save(tmp_path, step, weights[step], weights[best], {}, {}, keep=1, best_step=best)
        live = {"weight": torch.zeros(3, 5)}
        _, _, found = checkpoints.load(tmp_path / f"step-{step}", live)
        assert torch.equal(live["weight"], weights[step]["weight"])
        assert torch.equal(found["weight"], weights[best]["weight"])
