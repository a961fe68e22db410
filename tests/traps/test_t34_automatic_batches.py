"""T34: memory that runs out makes parts of a step smaller, never the step; evaluation and training keep their own sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

TRAINING = Path(__file__).parents[1] / "training"
sys.path.insert(0, str(TRAINING))

from test_loop import fitted, places, prepared  # noqa: E402, F401 (a fixture)


def with_memory_for(run, rows, monkeypatch):
    """A machine on which so many rows fit: more ask for memory that no machine has."""
    sizes = {"learned": [], "read": []}
    learn, read = run.task.loss_sum, run.task.answers

    def loss_sum(model, batch):
        count = len(batch["input_ids"])
        if count > rows["learned"]:
            torch.empty(2**60, dtype=torch.uint8)
        sizes["learned"].append(count)
        return learn(model, batch)

    def answers(model, batch):
        count = len(batch["input_ids"])
        if count > rows["read"]:
            torch.empty(2**60, dtype=torch.uint8)
        sizes["read"].append(count)
        return read(model, batch)

    monkeypatch.setattr(run.task, "loss_sum", loss_sum)
    monkeypatch.setattr(run.task, "answers", answers)
    return sizes


def test_t34_an_evaluation_that_does_not_fit_leaves_training_alone(places, tmp_path, monkeypatch):  # noqa: F811
    plain, expected = fitted(prepared(places, tmp_path / "plain", batch_size=13))
    run = prepared(places, tmp_path / "short", batch_size=13)
    sizes = with_memory_for(run, {"learned": 13, "read": 3}, monkeypatch)
    short, found = fitted(run)
    assert max(sizes["learned"]) == 13
    assert max(sizes["read"]) <= 3
    assert short.notes == []
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert short.validation["loss"] == pytest.approx(plain.validation["loss"], abs=1e-5)
    assert short.validation["confusion"] == plain.validation["confusion"]


def test_t34_a_step_that_does_not_fit_is_computed_in_more_parts_with_the_same_rows(places, tmp_path, monkeypatch):  # noqa: F811
    lines, shorter = [], []
    _, expected = fitted(prepared(places, tmp_path / "plain", batch_size=13), lines.append)
    run = prepared(places, tmp_path / "short", batch_size=13)
    sizes = with_memory_for(run, {"learned": 4, "read": 99}, monkeypatch)
    result, found = fitted(run, shorter.append)
    assert max(sizes["learned"]) == 4
    assert max(sizes["read"]) > 4
    assert result.notes == [
        "memory ran out in step 1; from there on steps are computed in 2 parts",
        "memory ran out in step 1; from there on steps are computed in 4 parts",
    ]
    targets = [line["targets"] for line in lines if "targets" in line]
    assert [line["targets"] for line in shorter if "targets" in line] == targets
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=2e-4)


def test_t34_rows_that_do_not_fit_alone_end_the_run_with_what_helps(places, tmp_path, monkeypatch):  # noqa: F811
    from afina.errors import TrainingError

    run = prepared(places, tmp_path, batch_size=3)
    with_memory_for(run, {"learned": 0, "read": 99}, monkeypatch)
    with pytest.raises(TrainingError, match=r"memory ran out .* `afina plan` .* memory\.gradient_checkpointing"):
        fitted(run)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a process are Linux's")
def test_t34_a_machine_that_really_runs_out_goes_on_in_parts(places, tmp_path):  # noqa: F811
    """A process that may take little more than it has: the system itself refuses the memory of a whole step.

    The limit counts what the allocator keeps too, so every tensor gets a mapping of its own, given back when freed.
    """
    code = """
        import json, resource, sys
        from pathlib import Path
        sys.path[:0] = sys.argv[1:3]
        import torch
        import transformers as tf
        torch.set_num_threads(1)
        from test_loop import fitted, prepared
        from tiny_bases import tokenizer
        folder, rows = Path(sys.argv[3]), sys.argv[4]
        made = tokenizer()
        config = tf.BertConfig(vocab_size=len(made), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                               intermediate_size=16381, max_position_embeddings=61)
        tf.BertModel(config).save_pretrained(folder / "base")
        made.save_pretrained(folder / "base")
        def run(name, **options):
            return prepared((str(folder / "base"), rows), folder / name, epochs=1, max_length=19, **options)
        fitted(run("warm", batch_size=2))
        one = run("run", batch_size=67)
        taken = next(int(s.split()[1]) for s in open("/proc/self/status") if s.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, ((taken + 100 * 1024) * 1024,) * 2)
        result, _ = fitted(one)
        print(json.dumps([result.steps, result.notes]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(TRAINING), str(TRAINING.parent), str(tmp_path), places[1]],
        capture_output=True, text=True, timeout=300, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps, notes = json.loads(done.stdout.splitlines()[-1])
    assert steps > 0
    assert notes
    assert all("memory ran out in step" in note for note in notes)
