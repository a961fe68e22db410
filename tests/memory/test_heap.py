"""Freed memory of large tensors: kept for the next one, or given back, as a process asks glibc for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, torch
from afina.memory.heap import large_tensors_apart, large_tensors_kept
from afina.memory.measure import resident, trim

def taken():  # pages of 4 KiB that the system gives for tensors of 61 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(61 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for ask in (large_tensors_apart, large_tensors_kept):
    ask()
    print(min(taken() for _ in range(10)))  # the heap grows until its holes are large enough
held = resident()
trim()
print(held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_tensors_are_kept_or_go_back_and_a_trim_gives_back_what_was_kept():
    apart, kept, given_back = _told({})
    pages = 61 << 8
    assert kept < 64
    assert apart > 5 * pages / 512  # huge pages are counted once each
    assert given_back > 55 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_the_environment_asks_of_malloc_stands():
    apart, never_kept, _ = _told({"MALLOC_MMAP_THRESHOLD_": str(1 << 16)})
    assert min(apart, never_kept) > 5 * (61 << 8) / 512


def _told(environment):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))
