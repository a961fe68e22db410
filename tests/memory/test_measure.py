"""Measured memory agrees with what was taken."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
import torch

from afina.memory import measure
from afina.memory.measure import available, is_out_of_memory

CPU = torch.device("cpu")


# In a process of its own, whose memory nothing else takes and gives back meanwhile.
_TAKEN = """
import sys
from pathlib import Path
import torch
from afina.memory import measure
if sys.argv[1] == "watched":  # where the kernel keeps no mark
    measure._CLEAR = Path("/absent/clear_refs")
for megabytes in (307, 61, 211):  # an older, higher peak does not count
    with measure.measured(torch.device("cpu")) as peak:
        made = torch.ones(megabytes * 2**18)
        for _ in range(20):
            made += 1
        del made
    print(peak.added / 2**20, (peak.most - measure.resident()) / 2**20)
"""


@pytest.mark.parametrize("kept_by", ["kernel", "watched"])
def test_a_peak_is_seen_after_it_is_over(kept_by):
    done = subprocess.run([sys.executable, "-c", _TAKEN, kept_by], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for megabytes, line in zip((307, 61, 211), done.stdout.splitlines(), strict=True):
        added, gone = map(float, line.split())
        assert added == pytest.approx(megabytes, rel=0.1)
        assert gone > megabytes / 2


@pytest.mark.parametrize(
    "names", [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")]
)
def test_a_container_s_limit_counts(monkeypatch, tmp_path, names):
    monkeypatch.setattr(measure, "_GROUP", tmp_path)
    assert 0 < available(CPU) <= psutil.virtual_memory().total
    for name, value in zip(names, ("700000001\n", "300000000\n"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(value)
    assert available(CPU) == 400_000_001
    (tmp_path / names[0]).write_text("max\n")  # no limit
    assert available(CPU) > 400_000_001


def test_a_refused_allocation_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.ones(3, 5) @ torch.ones(3, 5)
    assert not is_out_of_memory(other.value)
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN, of its workspace
    lacking = "could not create a primitive descriptor for the inner product forward propagation primitive"
    assert not is_out_of_memory(RuntimeError(lacking))  # the processor does not do it
