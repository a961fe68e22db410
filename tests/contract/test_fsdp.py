"""Contract 12: every method has the same gradients on two FSDP2 processes as on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from afina.core.registry import methods


def test_12_same_gradients_on_two_fsdp2_processes() -> None:
    worker = Path(__file__).with_name("fsdp_worker.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=worker.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    results = dict(line.split() for line in done.stdout.splitlines() if line.endswith(("equal", "DIFFERENT")))
    assert results == dict.fromkeys(methods(), "equal"), done.stderr[-2000:]
    assert done.returncode == 0
