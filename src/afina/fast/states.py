"""Hidden states on the disk, found by what they follow from, mapped into memory and never loaded whole.

One file holds the states of one frozen trunk, row after row, in the type they were computed in. Its folder is named by a
hash of the trunk, so that runs and sweeps over the same base share it; a file beside says which row lies where and is
written when the file is complete up to there, so that a run that was killed leaves nothing wrong behind. Who adds to the
file has it locked; others who add at the same time do so in a file of their own, which has no name and is of no use later.
Files stay open, so that what is read stays when others remove the folder to make room.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["States"]

_INDEX, _DATA = "index.json", "states.bin"


class _File:
    """An open file, mapped as far as it has been read; closed with its last user."""

    def __init__(self, file: Any):
        self.file, self.mapped = file, torch.empty(0, dtype=torch.uint8)
        weakref.finalize(self, file.close)

    def read(self, first: int, last: int) -> torch.Tensor:
        if len(self.mapped) < last:
            self.mapped = torch.from_numpy(np.memmap(self.file, dtype=np.uint8, mode="c"))
        return self.mapped[first:last]

    def write(self, first: int, content: Any) -> None:
        self.file.seek(first)
        self.file.write(content)
        self.file.flush()


class States:
    """Rows of hidden states `[tokens, width]`, or `[channels, height, width]`, by a digest; `limit` is in bytes, and what is
    over it is not kept.

    Several processes may read; one at a time writes, the others keep what they add to themselves.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.rows: dict[str, tuple[int, int]] = {}  # digest -> first byte, tokens
        self.rest, self.dtype = list[int](), torch.float32  # sizes of a row but the first, which differs from row to row
        self.size = 0
        self.new = False  # rows that no file names yet
        self._shared: _File | None = None
        self._added: _File | None = None  # the same one, or what only this one reads
        self._apart = 0  # first byte of what lies in that
        folder.mkdir(parents=True, exist_ok=True)
        self._read()

    def _read(self) -> None:
        """Take over what is there."""
        with suppress(OSError, ValueError, KeyError):
            about = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))
            found = _File((self.folder / _DATA).open("rb", buffering=0))
            if os.fstat(found.file.fileno()).st_size < about["size"]:
                return
            self.rest, self.dtype, self.size = about["rest"], getattr(torch, about["dtype"]), about["size"]
            self.rows = {digest: (first, tokens) for digest, first, tokens in about["rows"]}
            self._shared = found
            os.utime(self.folder)

    def __contains__(self, digest: str) -> bool:
        return digest in self.rows

    def add(self, digest: str, states: torch.Tensor) -> bool:
        """Keep the states of a row; False where the limit is reached, or the folder is there no more."""
        if digest in self.rows:
            return True
        if self.size + states.nbytes > self.limit:
            return False
        if self._added is None:
            try:
                self._added = self._writable()
            except FileNotFoundError:
                return False
            if digest in self.rows:  # another has added it meanwhile
                return True
        if not self.rows:
            self.rest, self.dtype = list(states.shape[1:]), states.dtype
        self._added.write(self.size - self._apart, states.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.new = True
        self.rows[digest] = (self.size, len(states))
        self.size += states.nbytes
        return True

    def _writable(self) -> _File:
        """The file that all read, with what others have added to it by now, or where one of them adds now, another."""
        path = self.folder / _DATA
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        known = self._shared is None or _same(file, os.fstat(self._shared.file.fileno()))
        if known and _locked(file) and path.is_file() and _same(file, path.stat()):  # it may have been removed, or made anew
            self._read()
            file.truncate(self.size)  # of who was killed
            self._shared = _File(file)
            return self._shared
        file.close()
        self._apart = self.size
        return _File(tempfile.TemporaryFile(buffering=0, dir=self.folder))

    def get(self, digest: str) -> torch.Tensor:
        """The states of a row, mapped."""
        first, tokens = self.rows[digest]
        size = tokens * math.prod(self.rest) * self.dtype.itemsize
        file, at = (self._added, self._apart) if first >= self._apart and self._added is not None else (self._shared, 0)
        assert file is not None
        return file.read(first - at, first - at + size).view(self.dtype).view(tokens, *self.rest)

    def keep(self) -> None:
        """Write down which rows are there, for the next run, if they are where it looks."""
        if not self.new or self._added is None or self._added is not self._shared:
            return
        self.new = False
        rows = [[digest, first, tokens] for digest, (first, tokens) in self.rows.items()]
        about = {"rest": self.rest, "dtype": str(self.dtype).removeprefix("torch."), "size": self.size, "rows": rows}
        beside = self.folder / f".{_INDEX}.{os.getpid()}"
        with suppress(FileNotFoundError):  # removed meanwhile
            if not _same(self._added.file, (self.folder / _DATA).stat()):
                return
            beside.write_text(json.dumps(about), encoding="utf-8")
            os.replace(beside, self.folder / _INDEX)

    def forget(self) -> None:
        """Remove everything."""
        self._shared = self._added = None
        self.rows, self.size, self._apart = {}, 0, 0
        shutil.rmtree(self.folder, ignore_errors=True)


def _same(file: Any, other: os.stat_result) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), other)


def _locked(file: Any) -> bool:
    """Whether nobody else has this file locked; it is locked now, until it is closed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
