"""What glibc does with the memory of large tensors that are let go (CPU): give it back to the system, or keep it.

By itself glibc puts a large tensor in pages of its own and gives them back, until it has learned from those that were freed
to put others of their size, up to 32 MB, among the small things of its heap. Pages from the system are cleared first and
mapped one by one, which a training step that takes tensors over 32 MB, or makes the heap's end free, pays for each time. So
a run does one of two things. `large_tensors_kept`: freed memory stays for the next step; it lies in holes between what is
not free. `large_tensors_apart`: every large tensor in pages of its own, which go back at once; a step that needs 240 MB
then holds 240 and not 450, and takes more time: `benchmarks/speed.py` shows how much. Who has set glibc's malloc in the
environment of the process is left in charge of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

__all__ = ["APART", "KEPT", "TRIMMED", "large_tensors_apart", "large_tensors_kept"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
APART = 1 << 20  # bytes from which tensors have pages of their own, that go back
TRIMMED = 1 << 26  # bytes free at the heap's end from which they go back there, too
KEPT = 1 << 28  # the same, where freed memory is kept: single tensors above are too rare to be worth their holes


def large_tensors_apart() -> None:
    """From now on, in this process, tensors from `APART` on go back to the system; does nothing where the C library is not
    glibc."""
    _set({_M_MMAP_THRESHOLD: APART, _M_TRIM_THRESHOLD: TRIMMED})


def large_tensors_kept() -> None:
    """From now on, in this process, the heap keeps what is freed, of tensors below `KEPT`, until `memory.measure.trim` is
    called; does nothing where the C library is not glibc."""
    _set({_M_MMAP_THRESHOLD: KEPT, _M_TRIM_THRESHOLD: -1})  # -1: never


def _set(options: dict[int, int]) -> None:
    asked = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ)
    if sys.platform.startswith("linux") and not asked and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            for option, value in options.items():
                library.mallopt(option, value)
