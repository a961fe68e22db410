"""Files written whole or not at all, and weights read without running any code they may hold.

torch is loaded with the first weights: reports are written without it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from afina.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["cache_folder", "read_weights", "write_atomically", "write_weights"]


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, flush it to the disk and put it in `path`'s place in one step."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(beside)
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # safetensors writes files that nobody else may read
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, after checking it: every tensor is real, finite, and reads back equal.

    Raises CheckpointError before an older file is replaced.
    """
    import torch
    from safetensors.torch import save_file

    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{key} has no values (it is on the meta device); nothing was written")
        if hasattr(tensor, "to_local"):
            raise CheckpointError(f"{key} is a shard, of which other processes hold the rest; nothing was written")
        if tensor.numel() == 0:
            raise CheckpointError(f"{key} is empty (a shard of another process?); nothing was written")
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise CheckpointError(f"{key} holds values that are not finite; nothing was written")
    ready = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}

    def write(beside: Path) -> None:
        save_file(ready, beside, metadata={"format": "pt", **metadata})
        found = read_weights(beside)
        wrong = [k for k, t in ready.items() if k not in found or not torch.equal(found[k], t)]
        if wrong or len(found) != len(ready):
            raise CheckpointError(f"{path} did not read back as written: {', '.join(wrong[:5])}")

    write_atomically(path, write)


def _is_finite(tensor: torch.Tensor) -> bool:
    """A sum is finite only over finite values, and takes a tenth of the time; that of large ones may overflow."""
    import torch

    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.safetensors` or, weights only, of a `.bin` file, on the CPU; raises CheckpointError."""
    import torch

    if path.suffix == ".bin":
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a broken or unsafe pickle
            raise CheckpointError(
                f"{path} cannot be read as weights alone, and afina never runs the code in a file: {str(error)[:200]}"
            ) from None
        if not isinstance(loaded, Mapping) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
            raise CheckpointError(f"{path} is not a table of tensors")
        return dict(loaded)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
        raise CheckpointError(
            f"{path} ({size}) is broken or not a safetensors file: {error}. It was not written or copied to its end: "
            "copy it again, or train again with the run's recipe.yaml"
        ) from None


def cache_folder(name: str) -> Path | None:
    """Where afina keeps what it need not compute again; None where AFINA_CACHE is off."""
    asked = os.environ.get("AFINA_CACHE", "")
    if asked.lower() in ("off", "0", "false", "no"):
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(asked) if asked else home / "afina") / name
