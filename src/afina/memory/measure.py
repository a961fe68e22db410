"""Measured memory: what is free, what a stretch of work took at most, whether an error means that there was too little."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

__all__ = ["Peak", "available", "give_back", "is_out_of_memory", "measured", "release", "resident", "trim"]

# The last two are how oneDNN says that its workspace was refused on a CPU.
_REFUSED = (
    "out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a primitive", "could not create a memory",
)  # fmt: skip
_STATUS, _CLEAR, _GROUP = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/sys/fs/cgroup")


@dataclass
class Peak:
    """Bytes: in use before, and at most while it was measured. On a CPU, of the whole process (resident)."""

    before: int = 0
    most: int = 0

    @property
    def added(self) -> int:
        """Bytes above what was in use before."""
        return max(0, self.most - self.before)


def available(device: torch.device) -> int:
    """Bytes that this process could still take; a container's limit counts."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = psutil.virtual_memory().available
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int((_GROUP / limit).read_text()) - int((_GROUP / used).read_text()))
    return max(0, free)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(psutil.Process().memory_info().rss)


def release(device: torch.device) -> None:
    """Give back what no tensor holds any more, so that the next measurement begins from what is really in use."""
    gc.collect()
    give_back(device)


def give_back(device: torch.device) -> None:
    """The same without a search for cycles, which in a large process takes a quarter of a second."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Give freed memory of the process back to the system (Linux): freed tensors of many sizes leave gaps that only grow."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[Peak]:
    """The peak of a stretch of work, in `Peak.most` once it is over.

    A GPU's allocator counts exactly. On a CPU it is the kernel's own high-water mark of resident memory, which is set back
    at the start (Linux); elsewhere a thread looks every millisecond.
    """
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        found = Peak(before=torch.cuda.memory_allocated(device))
        try:
            yield found
        finally:
            torch.cuda.synchronize(device)
            found.most = torch.cuda.max_memory_allocated(device)
        return
    found = Peak(before=resident())
    try:
        _CLEAR.write_text("5")  # sets VmHWM back to the present
    except OSError:
        with _watched(found):
            yield found
        return
    try:
        yield found
    finally:
        found.most = max(found.before, _high_water())


def _high_water() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def _watched(found: Peak) -> Iterator[None]:
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            found.most = max(found.most, resident())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        found.most = max(found.most, resident())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a GPU's, or a CPU allocation that the system refused."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).replace("primitive descriptor", "")  # which a processor that lacks an operation is refused
    return isinstance(error, RuntimeError) and any(words in said for words in _REFUSED)
