"""Tensors that are computed once: on the disk, where a later run finds them, or in memory where there is no cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from afina.core.files import write_atomically

__all__ = ["Kept"]

Tensors = dict[str, torch.Tensor]
_MOST = 8 << 30  # bytes in a folder; the least recently used go first


class Kept:
    """Tensors by what they follow from. `folder` None: in memory alone."""

    def __init__(self, folder: Path | None):
        self.folder, self.here = folder, dict[str, Tensors]()

    def get(self, about: Any, make: Callable[[], Tensors]) -> Tensors:
        """What `make` makes, made once for the same `about` (JSON)."""
        name = _name(about)
        if name not in self.here:
            self.here[name] = self._read(name) or self._written(name, make())
        return self.here[name]

    def has(self, about: Any) -> bool:
        """Whether it is there."""
        name = _name(about)
        return name in self.here or (self.folder is not None and (self.folder / f"{name}.safetensors").is_file())

    def _read(self, name: str) -> Tensors | None:
        from safetensors.torch import load_file

        if self.folder is None:
            return None
        path = self.folder / f"{name}.safetensors"
        with suppress(Exception):  # a file that cannot be read is made again
            found = load_file(path)
            os.utime(path)
            return found
        return None

    def _written(self, name: str, made: Tensors) -> Tensors:
        from safetensors.torch import save_file

        made = {key: tensor.detach().cpu().contiguous() for key, tensor in made.items()}
        if self.folder is not None:
            with suppress(OSError):  # a cache that cannot be written is no reason to stop
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / f"{name}.safetensors", lambda path: save_file(made, path))
                self._tidy()
        return made

    def _tidy(self) -> None:
        assert self.folder is not None
        files = sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        size = sum(p.stat().st_size for p in files)
        for old in files:
            if size <= _MOST:
                return
            size -= old.stat().st_size
            old.unlink(missing_ok=True)


def _name(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
