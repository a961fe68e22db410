"""What glibc does with the memory of large tensors that are let go (CPU): give it back to the system, or keep it.

By itself glibc puts a large tensor in pages of its own and gives them back, until it has learned from those that were freed
to put others of their size, up to 32 MB, among the small things of its heap. Pages from the system are cleared first and
mapped one by one, which a training step that takes tensors over 32 MB, or makes the heap's end free, pays for each time. So
a run does one of two things. `large_tensors_kept`, around its training: freed memory stays for the next step; it lies in
holes between what is not free. `large_tensors_apart`: every large tensor in pages of its own, which go back at once; a step
that needs 240 MB then holds 240 and not 450, and takes more time: `benchmarks/speed.py` shows how much. Who has set glibc's
malloc in the environment of the process is left in charge of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

from afina.memory.measure import trim

__all__ = ["APART", "KEPT", "TRIMMED", "large_tensors_apart", "large_tensors_kept"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
APART = 1 << 20  # bytes from which tensors have pages of their own, that go back
TRIMMED = 1 << 26  # bytes free at the heap's end from which they go back there, too
KEPT = 1 << 28  # the same, where freed memory is kept: single tensors above are too rare to be worth their holes
_MOST = 1 << 25  # of it that older versions of glibc take (2.36 takes any); they refuse more, and keep what was set before

_lock, _keeping = threading.Lock(), 0  # how many ask at the moment that freed memory stays


def large_tensors_apart() -> None:
    """From now on, in this process, tensors from `APART` on go back to the system, but while something asks for them to be
    kept; does nothing where the C library is not glibc."""
    with _lock:
        if not _keeping:
            _set({_M_MMAP_THRESHOLD: APART, _M_TRIM_THRESHOLD: TRIMMED})


@contextlib.contextmanager
def large_tensors_kept(asked: bool = True) -> Iterator[None]:
    """Within it, the heap of this process keeps what is freed, of tensors below `KEPT`; after the last of several that
    overlap, tensors lie apart and what is free goes back. Does nothing unless `asked`, nor where the C library is not
    glibc."""
    global _keeping
    if not asked:
        yield
        return
    with _lock:
        _keeping += 1
        _set({_M_MMAP_THRESHOLD: KEPT, _M_TRIM_THRESHOLD: -1})  # -1: never
    try:
        yield
    finally:
        with _lock:
            _keeping -= 1
            last = not _keeping
        if last:
            large_tensors_apart()
            trim()


def _set(options: dict[int, int]) -> None:
    asked = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ)
    if sys.platform.startswith("linux") and not asked and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            for option, value in options.items():
                if not library.mallopt(option, value):
                    library.mallopt(option, _MOST)
