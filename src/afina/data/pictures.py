"""Pictures, as people have them: turned by their EXIF, grey, with transparency or a palette, sixteen bits deep, truncated.

All are brought to 8-bit RGB in one way, so that training, testing and answering see the same: turned upright, put on white
where they are transparent, sixteen bits scaled to eight (not cut off). PIL comes with `afina[vision]`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from afina.data.media import Look, Medium
from afina.errors import MissingDependencyError

__all__ = ["MASK", "PICTURE", "check_pillow", "picture_size", "read_mask", "read_picture"]

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = 5  # its values from here on are turned by a quarter
_MOST_PIXELS = 150_000_000
_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")


def check_pillow() -> None:
    """Raise MissingDependencyError where PIL is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise MissingDependencyError("pillow", "vision", "reading pictures") from None


def read_picture(path: str | Path) -> Any:
    """The picture in a file, upright, as RGB. Raises ValueError saying what is wrong with the file."""
    return _read(path)[0]


def picture_size(path: str | Path) -> tuple[int, int]:
    """Width and height of the picture in a file, upright; its pixels are not read. Raises ValueError where it is none."""
    check_pillow()
    from PIL import Image

    try:
        with Image.open(path) as opened:
            width, height = opened.size
            return (height, width) if opened.getexif().get(_ORIENTATION, 1) >= _TURNED else (width, height)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _read(path: str | Path) -> tuple[Any, tuple[str, ...]]:
    """The picture, and what was done to it."""
    from PIL import ImageOps

    opened, frames = _opened(path)
    notes = []
    if frames > 1:
        notes.append("of several frames, of which the first is read")
    picture = ImageOps.exif_transpose(opened)
    if opened.getexif().get(_ORIENTATION, 1) != 1:
        notes.append("turned upright, as their EXIF says")
    if picture.mode in _SIXTEEN or picture.mode in ("I", "F"):
        notes.append("of more than eight bits, scaled to eight")
        picture = _eight_bits(picture)
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        notes.append("transparent, put on white")
        picture = _on_white(picture)
    elif picture.mode in ("L", "1"):
        notes.append("grey, read as RGB")
    elif picture.mode not in ("RGB", "P"):
        notes.append(f"of mode {picture.mode}, read as RGB")
    return picture.convert("RGB"), tuple(notes)


def _opened(path: str | Path) -> tuple[Any, int]:
    """The first picture of a file, read to its end, and how many there are."""
    check_pillow()
    from PIL import Image, UnidentifiedImageError

    try:
        with Path(path).open("rb") as file:
            opened = Image.open(file)
            if opened.width * opened.height > _MOST_PIXELS:
                raise ValueError(f"it has {opened.width} x {opened.height} pixels, more than any photo, and is not unpacked")
            opened.load()
            return opened, int(getattr(opened, "n_frames", 1))
    except UnidentifiedImageError:
        empty = Path(path).stat().st_size == 0
        raise ValueError("the file is empty" if empty else "it is no picture that can be read") from None
    except Image.DecompressionBombError:
        raise ValueError("it has more pixels than any photo, and is not unpacked") from None
    except (OSError, SyntaxError, IndexError, KeyError, EOFError, TypeError) as error:
        raise ValueError(f"it is broken: {error}") from None


def _eight_bits(picture: Any) -> Any:
    import numpy as np
    from PIL import Image

    values = np.asarray(picture).astype(np.float64)
    low, high = (0, 65535) if values.max() > 255 or picture.mode in _SIXTEEN else (0, 255)
    if picture.mode == "F" and values.max() <= 1:
        high = 1
    return Image.fromarray(np.clip((values - low) * (255 / (high - low)) + 0.5, 0, 255).astype(np.uint8))


def _on_white(picture: Any) -> Any:
    from PIL import Image

    own = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", own.size, (255, 255, 255, 255)), own)


def _look(path: Path) -> Look:
    picture, notes = _read(path)
    made = hashlib.blake2b(f"{picture.size}".encode(), digest_size=16)
    made.update(picture.tobytes())
    return Look(made.hexdigest(), notes)


def read_mask(path: str | Path) -> Any:
    """The class numbers of a mask's pixels, `[height, width]` uint8 or int32. Raises ValueError for a picture in colours."""
    import numpy as np
    from PIL import ImageOps

    mask = ImageOps.exif_transpose(_opened(path)[0])
    if mask.mode not in ("L", "P", "1", "I", *_SIXTEEN):
        raise ValueError(f"it is a picture of mode {mask.mode}; a mask has one number a pixel (grey, or with a palette)")
    return np.asarray(mask).astype(np.int32)


def _look_at_mask(path: Path) -> Look:
    mask = read_mask(path)
    return Look(hashlib.blake2b(f"{mask.shape}".encode() + mask.tobytes(), digest_size=16).hexdigest())


PICTURE = Medium("picture", ENDINGS, _look, check_pillow)
MASK = Medium("mask", (".png", ".tif", ".tiff", ".bmp", ".gif"), _look_at_mask, check_pillow)
