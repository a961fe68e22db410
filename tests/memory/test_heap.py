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

def taken(megabytes):  # pages of 4 KiB that the system gives for them
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(megabytes << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def least(megabytes=61):  # the heap grows until its holes are large enough
    return min(taken(megabytes) for _ in range(6))

large_tensors_apart()
print(least())
with large_tensors_kept(False):
    print(least())
with large_tensors_kept():
    with large_tensors_kept():
        print(least())
    large_tensors_apart()  # another run is prepared meanwhile
    print(least())
    held = resident()
    trim()
    print(held - resident())
    least()
    held = resident()
print(held - resident())
print(least(97))  # more than may lie free at the heap's end
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_tensors_are_kept_or_go_back_and_a_trim_gives_back_what_was_kept():
    apart, not_asked, kept, still_kept, trimmed, left, after = _told({})
    pages = 61 << 8
    assert max(kept, still_kept) < 64
    assert min(apart, not_asked, after) > 3 * pages / 512  # huge pages are counted once each
    assert min(trimmed, left) > 55 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_the_environment_asks_of_malloc_stands():
    taken = _told({"MALLOC_MMAP_THRESHOLD_": str(1 << 16)})
    assert min(taken[:4]) > 3 * (61 << 8) / 512


def _told(environment):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))
