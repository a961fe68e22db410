"""T25: two processes train what one trains, also where a step has fewer rows than processes and parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from test_loop import fitted, prepared
from tiny_bases import save_bert, write_rows


def test_t25_two_processes_get_what_one_gets(tmp_path):
    places = (str(save_bert(tmp_path / "base")), str(write_rows(tmp_path / "rows.csv", 59)))
    run = prepared(places, tmp_path / "one", epochs=1, batch_size=5)
    assert len(run.rows["train"].features) % 5 == 1  # the last step leaves a process without a row
    losses = []
    _, weights = fitted(run, lambda line: losses.append(line["loss"]) if "loss" in line else None)
    torch.save({"weights": weights, "losses": losses}, tmp_path / "expected.pt")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(Path(__file__).with_name("ddp_worker.py")), str(tmp_path),
        ],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("EQUAL") == 1
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == len(losses) + 1
