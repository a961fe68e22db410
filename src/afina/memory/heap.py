"""Large tensors in pages of their own, which go back to the system when they are let go (glibc, CPU).

glibc learns from the first large tensor that is freed to put later ones up to 32 MB among the small things of its heap,
where what is free lies between what is not: a step that needs 240 MB at once then holds 450. The other way costs time, since
the system clears every page that it gives: a quarter to a third more of a step's, so it is taken where memory is short.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

__all__ = ["LARGE", "large_tensors_apart"]

_M_MMAP_THRESHOLD = -3
LARGE = 1 << 20  # bytes


def large_tensors_apart() -> None:
    """From now on, in this process; does nothing where the C library is not glibc."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, LARGE)
