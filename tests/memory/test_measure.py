"""Measured memory agrees with what was taken."""

from __future__ import annotations

from mmap import PAGESIZE, mmap

import psutil
import pytest
import torch

from afina.memory import measure
from afina.memory.measure import available, is_out_of_memory, measured, release, resident

CPU = torch.device("cpu")


def took(megabytes):
    """Takes memory and gives it back, past malloc, which may keep what is freed (afina/memory/heap.py sets how much)."""
    with mmap(-1, megabytes * 2**20) as made:
        made[::PAGESIZE] = b"\1" * len(range(0, len(made), PAGESIZE))  # pages count when they are touched


@pytest.mark.parametrize("megabytes", [61, 211])
def test_a_peak_is_seen_after_it_is_over(megabytes):
    took(307)  # an older, higher peak does not count
    with measured(CPU) as peak:
        took(megabytes)
    assert peak.added == pytest.approx(megabytes * 2**20, rel=0.1)
    assert resident() < peak.most - megabytes * 2**19


def test_a_watching_thread_sees_it_where_the_kernel_keeps_no_mark(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "_CLEAR", tmp_path / "absent" / "clear_refs")
    release(CPU)
    with measured(CPU) as peak:
        made = torch.ones(97 * 2**18)
        for _ in range(20):
            made += 1
    assert peak.added == pytest.approx(97 * 2**20, rel=0.2)


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
