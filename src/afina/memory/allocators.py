"""What an allocator holds for the tensors that are alive: more than their bytes, since freed blocks leave holes.

Both are played through with the sizes and the order of a trace. `Heap` is glibc's malloc, which torch takes a CPU's memory
from: what is larger than a threshold is mapped by itself and goes back at once, the rest lies in one heap where the smallest
hole that is large enough is taken, and the heap shrinks only where its end is free, or never (mallopt(3): M_MMAP_THRESHOLD
and M_TRIM_THRESHOLD, which `memory/heap.py` sets). torch asks for addresses that are multiples of 64, and for these glibc
before 2.38 looks for a hole of 112 bytes more than is needed, so that a block never goes where one of the same size was
freed, and holes stay.

`Pools` is torch's caching allocator of a GPU: blocks of 512 bytes, in segments of 2 MiB for small ones, of 20 MiB up to
10 MiB, of whole 2 MiB above; segments are kept.
"""

from __future__ import annotations

import platform
from bisect import bisect_left, insort
from typing import Protocol

__all__ = ["Allocator", "Heap", "Pools"]

_KIB, _MIB = 1 << 10, 1 << 20


class Allocator(Protocol):
    """`held` is how many bytes it has from the system."""

    held: int

    def take(self, size: int) -> int:
        """A block of at least `size` bytes, by a number."""

    def give(self, block: int) -> None:
        """Give a block back."""


def _old() -> bool:
    """Whether the C library is a glibc before 2.38."""
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) < (2, 38)


class _Free:
    """Free stretches of one address space, by size and by place; neighbours are joined."""

    def __init__(self) -> None:
        self.by_size: list[tuple[int, int]] = []
        self.size_at: dict[int, int] = {}
        self.start_of: dict[int, int] = {}  # end -> start

    def best(self, size: int) -> int | None:
        """Takes `size` bytes out of the smallest stretch that is large enough; returns where they begin."""
        at = bisect_left(self.by_size, (size, -1))
        if at == len(self.by_size):
            return None
        start = self.by_size[at][1]
        rest = self.remove(start) - size
        if rest:
            self.add(start + size, rest)
        return start

    def add(self, start: int, size: int) -> tuple[int, int]:
        """Free a stretch; returns what it has become with its neighbours."""
        before = self.start_of.get(start)
        if before is not None:
            size += self.remove(before)
            start = before
        if start + size in self.size_at:
            size += self.remove(start + size)
        self.size_at[start], self.start_of[start + size] = size, start
        insort(self.by_size, (size, start))
        return start, size

    def remove(self, start: int) -> int:
        """Take a whole stretch out; returns its size."""
        size = self.size_at.pop(start)
        del self.start_of[start + size]
        del self.by_size[bisect_left(self.by_size, (size, start))]
        return size


class Heap:
    """glibc's malloc in one thread: blocks of `threshold` bytes and more are mapped, and where more than `trimmed` bytes are
    free at its end they go back (None: never)."""

    _PAD, _ALIGNED = 128 * _KIB, 64

    def __init__(self, threshold: int, trimmed: int | None = None, *, slack: int | None = None):
        self.slack = (112 if _old() else 0) if slack is None else slack
        self.threshold, self.trimmed = threshold, trimmed
        self.free, self.top, self.end = _Free(), 0, 0  # below `top` blocks and holes, from there to `end` nothing
        self.sizes: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.held = self._of_mapped = self._number = 0

    def take(self, size: int) -> int:
        """See `Allocator`."""
        size = max(32, -(-(size + 8) // 16) * 16)
        wanted = size + self.slack  # so that there is an aligned address in it
        start = self.free.best(wanted)
        if start is None and self.end - self.top < wanted and wanted >= self.threshold:
            self._number -= 1
            self.mapped[self._number] = -(-wanted // 4096) * 4096
            self._of_mapped += self.mapped[self._number]
            self.held = self.end + self._of_mapped
            return self._number
        if start is None:
            start, self.top = self.top, self.top + wanted
            if self.top > self.end:
                self.end = self.top + self._PAD
        lead = -(start + 16) % self._ALIGNED if self.slack else 0
        lead += self._ALIGNED if 0 < lead < 32 else 0
        if lead:
            self.free.add(start, lead)
        if (rest := wanted - lead - size) >= 32:
            self._freed(start + lead + size, rest)
        else:
            size += rest
        self.sizes[start + lead] = size
        self.held = self.end + self._of_mapped
        return start + lead

    def _freed(self, start: int, size: int) -> int:
        """Free a stretch of the heap; returns the size of what it became, with the heap's empty end where it reaches it."""
        start, size = self.free.add(start, size)
        if start + size != self.top:
            return size
        self.free.remove(start)
        self.top = start
        return size + self.end - self.top

    def give(self, block: int) -> None:
        """See `Allocator`."""
        if block < 0:
            self._of_mapped -= self.mapped.pop(block)
        else:
            joined = self._freed(block, self.sizes.pop(block))
            if self.trimmed is not None and joined >= 64 * _KIB and self.end - self.top > self.trimmed:
                self.end = self.top + self._PAD
        self.held = self.end + self._of_mapped


class Pools:
    """torch's caching allocator of a CUDA device (its default settings)."""

    _BLOCK, _SMALL, _MIDDLE = 512, _MIB, 10 * _MIB

    def __init__(self) -> None:
        self.held = self._next = 0
        self.free = {True: _Free(), False: _Free()}  # of small blocks, and of others
        self.blocks: dict[int, tuple[bool, int]] = {}

    def take(self, size: int) -> int:
        """See `Allocator`."""
        size = max(1, -(-size // self._BLOCK)) * self._BLOCK
        small = size <= self._SMALL
        free = self.free[small]
        start = free.best(size)
        if start is None:
            segment = 2 * _MIB if small else 20 * _MIB if size < self._MIDDLE else -(-size // (2 * _MIB)) * 2 * _MIB
            self.held += segment
            start, self._next = self._next, self._next + segment + self._BLOCK  # segments are never neighbours
            if segment > size:
                free.add(start + size, segment - size)
        if not small and 0 < (rest := free.size_at.get(start + size, 0)) <= self._SMALL:
            free.remove(start + size)  # too little to be split off
            size += rest
        self.blocks[start] = small, size
        return start

    def give(self, block: int) -> None:
        """See `Allocator`."""
        small, size = self.blocks.pop(block)
        self.free[small].add(block, size)
