"""Pictures of one thing in a folder, and the square that is cut out of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from afina.data.pictures import PICTURE
from afina.errors import DataError, shortened

__all__ = ["ENDINGS", "find_pictures", "scaled", "square"]

ENDINGS = PICTURE.endings


def find_pictures(folder: Path, what: str) -> list[Path]:
    """The pictures that lie in a folder, by name; `what` names the option. Raises DataError where there are none."""
    if not folder.is_dir():
        kind = "is a file; give the folder that it lies in" if folder.is_file() else "does not exist"
        raise DataError(f"{what} {folder} {kind}")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and p.is_file() and p.name[0] != ".")
    if not found:
        here = shortened(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise DataError(f"{what} {folder} has no picture ({', '.join(ENDINGS)}); it holds {here}")
    return found


def scaled(picture: Any, size: int) -> torch.Tensor:
    """Its shorter side `size` pixels long: `[3, height, width]`, whole numbers from 0 to 255."""
    import numpy as np
    from PIL import Image

    width, height = picture.size
    share = size / min(width, height)
    shape = (max(size, round(width * share)), max(size, round(height * share)))
    return torch.from_numpy(np.array(picture.resize(shape, Image.Resampling.LANCZOS))).permute(2, 0, 1)


def square(
    pixels: torch.Tensor, size: int, chance: torch.Generator | None = None, *, crop: bool = False, flip: bool = False
) -> tuple[torch.Tensor, tuple[int, int]]:
    """A square `[3, size, size]` from -1 to 1, and the row and column it begins in.

    From the middle, or with `crop` from where `chance` says; with `flip` mirrored half of the time.
    """
    begin = []
    for length in pixels.shape[1:]:
        room = length - size
        begin.append(room // 2 if chance is None or not crop else int(torch.randint(room + 1, (1,), generator=chance)))
    top, left = begin
    cut = pixels[:, top : top + size, left : left + size].float() / 127.5 - 1
    if flip and chance is not None and int(torch.randint(2, (1,), generator=chance)):
        cut = cut.flip(-1)
    return cut, (top, left)
