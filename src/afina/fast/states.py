"""Hidden states on the disk, found by what they follow from, mapped into memory and never loaded whole.

One file holds the states of one frozen trunk, row after row, in the type they were computed in. Its folder is named by a
hash of the trunk, so that runs and sweeps over the same base share it; a file beside says which row lies where and is
written when the file is complete up to there, so that a run that was killed leaves nothing wrong behind.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["States"]

_INDEX, _DATA = "index.json", "states.bin"


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
        self._mapped: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError, ValueError, KeyError):
            self._read()

    def _read(self) -> None:
        about = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))
        if (self.folder / _DATA).stat().st_size < about["size"]:
            return
        self.rest, self.dtype, self.size = about["rest"], getattr(torch, about["dtype"]), about["size"]
        self.rows = {digest: (first, tokens) for digest, first, tokens in about["rows"]}
        os.utime(self.folder)

    def __contains__(self, digest: str) -> bool:
        return digest in self.rows

    def add(self, digest: str, states: torch.Tensor) -> bool:
        """Keep the states of a row; False where the limit is reached."""
        if digest in self.rows:
            return True
        if self.size + states.nbytes > self.limit:
            return False
        if not self.rows:
            self.rest, self.dtype, self.size = list(states.shape[1:]), states.dtype, 0
        with (self.folder / _DATA).open("r+b" if self.size else "wb") as file:
            file.seek(self.size)
            file.write(states.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.new = True
        self.rows[digest] = (self.size, len(states))
        self.size += states.nbytes
        return True

    def get(self, digest: str) -> torch.Tensor:
        """The states of a row, mapped."""
        first, tokens = self.rows[digest]
        last = first + tokens * math.prod(self.rest) * self.dtype.itemsize
        if self._mapped is None or len(self._mapped) < last:
            self._mapped = torch.from_numpy(np.memmap(self.folder / _DATA, dtype=np.uint8, mode="c"))
        return self._mapped[first:last].view(self.dtype).view(tokens, *self.rest)  # type: ignore[no-any-return]

    def keep(self) -> None:
        """Write down which rows are there, for the next run."""
        if not self.new:
            return
        self.new = False
        rows = [[digest, first, tokens] for digest, (first, tokens) in self.rows.items()]
        about = {"rest": self.rest, "dtype": str(self.dtype).removeprefix("torch."), "size": self.size, "rows": rows}
        beside = self.folder / f".{_INDEX}.{os.getpid()}"
        beside.write_text(json.dumps(about), encoding="utf-8")
        os.replace(beside, self.folder / _INDEX)

    def forget(self) -> None:
        """Remove everything."""
        self._mapped, self.rows, self.size = None, {}, 0
        shutil.rmtree(self.folder, ignore_errors=True)
