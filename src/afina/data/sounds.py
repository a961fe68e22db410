"""Recordings, as people have them: of any rate, in stereo, silent, truncated, cut short by a recorder.

All are brought to one channel (the mean of all) of 32-bit floats between -1 and 1, at the rate the model reads. libsndfile
reads them (WAV, FLAC, OGG, MP3, AIFF, ...); it comes with `afina[speech]`.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from afina.data.media import Look, Medium
from afina.errors import MissingDependencyError

__all__ = ["SOUND", "Size", "check_soundfile", "read_sound", "resampled", "size_of"]

ENDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf")
_SHORTEST = 0.03  # seconds; what is shorter holds no sound that a model's first window could read
_LONGEST = 4 * 3600
_SILENT = 2.0**-14  # between the lowest and the highest sample
_PAGE = 65307  # bytes of an Ogg page at most
_UNKNOWN = 0x7FFF0000  # bytes; what a recorder that could not go back writes into the header
_CROSSINGS = 64  # of zero, of the filter on each side
_BETA = 12.0  # of its Kaiser window: what must not be heard is 118 dB down
_PASSED = 0.95  # of the lower of both Nyquist frequencies
_PHASES = 2000


@dataclass(frozen=True)
class Size:
    """How long a recording is."""

    samples: int  # of each channel
    rate: int  # Hz

    def at(self, rate: int) -> int:
        """How many samples it has at another rate."""
        return self.samples if rate == self.rate else math.ceil(self.samples * rate / self.rate)


def check_soundfile() -> None:
    """Raise MissingDependencyError where soundfile is not installed."""
    try:
        import soundfile  # noqa: F401
    except (ImportError, OSError):  # OSError: libsndfile itself is lacking
        raise MissingDependencyError("soundfile", "speech", "reading recordings") from None


def read_sound(path: str | Path, rate: int, most: int | None = None) -> np.ndarray:
    """The recording in a file at `rate` Hz, one channel, `[samples]` float32; of at most `most` samples, the first ones.

    Raises ValueError saying what is wrong with the file.
    """
    with _opened(path) as file:
        own = int(file.samplerate)
        # a second more, so that what the filter reads beyond the end is there
        frames = -1 if most is None else min(file.frames, math.ceil(most * own / rate) + own)
        sound = _read(file, frames).mean(axis=1)
    made = resampled(sound, own, rate)
    return made if most is None else made[:most]


def size_of(path: str | Path) -> Size:
    """The length of a recording, from its header. Raises ValueError saying what is wrong with the file."""
    with _opened(path) as file:
        return Size(int(file.frames), int(file.samplerate))


def _opened(path: str | Path) -> Any:
    check_soundfile()
    import soundfile

    if Path(path).stat().st_size == 0:
        raise ValueError("the file is empty")
    try:
        return soundfile.SoundFile(str(path))
    except soundfile.SoundFileError as error:
        said = str(error).rpartition(": ")[2].strip().rstrip(".")
        raise ValueError(f"it is no recording that can be read{f': {said}' if said else ''}") from None
    except TypeError:  # of headerless files, whose rate nobody knows
        raise ValueError("it is no recording that can be read: it does not say its rate") from None


def _read(file: Any, frames: int = -1) -> np.ndarray:
    """`[frames, channels]` float32."""
    import soundfile

    try:
        return file.read(frames, dtype="float32", always_2d=True)  # type: ignore[no-any-return]
    except soundfile.SoundFileError as error:
        raise ValueError(f"it is broken: {str(error).rpartition(': ')[2].strip().rstrip('.')}") from None


def _look(path: Path) -> Look:
    with _opened(path) as file:
        said, rate = int(file.frames), int(file.samplerate)
        if said > _LONGEST * rate:
            raise ValueError(f"it lasts {said / rate / 3600:.1f} hours; cut it into pieces")
        sound = _read(file)
        lacking = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if lacking and int(lacking[2]) < int(lacking[1]) < _UNKNOWN:
        raise ValueError(f"it is truncated: {lacking[2]} of {lacking[1]} bytes of sound are there")
    if len(sound) < said:
        raise ValueError(f"it is truncated: {len(sound)} of {said} samples are there")
    if _endless(path):
        raise ValueError("it is truncated: its last page is missing")
    if not np.isfinite(sound).all():
        raise ValueError("it is broken: some samples are no numbers")
    if len(sound) < _SHORTEST * rate:
        raise ValueError(f"it lasts {1000 * len(sound) / rate:.0f} milliseconds, too short to hold a sound")
    if np.ptp(mixed := sound.mean(axis=1)) < _SILENT:
        other = np.ptp(sound, axis=0).max() >= _SILENT
        raise ValueError("its channels cancel each other out when they are mixed" if other else "it is silent")
    notes = [f"of {sound.shape[1]} channels, mixed to one"] if sound.shape[1] > 1 else []
    if np.abs(sound).max() >= 1.0 and (np.abs(mixed) >= 0.999).mean() > 0.01:
        notes.append("louder than can be written, and clipped")
    made = hashlib.blake2b(f"{rate} {sound.shape}".encode(), digest_size=16)
    made.update(np.ascontiguousarray(sound).tobytes())
    return Look(made.hexdigest(), tuple(notes))


def _endless(path: Path) -> bool:
    """Whether a file of Ogg pages (RFC 3533) lacks the last, which libsndfile does not mind."""
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return False
        file.seek(max(0, path.stat().st_size - _PAGE))
        tail = file.read()
    flags = tail[tail.rfind(b"OggS") :][5:6]
    return not flags or not flags[0] & 4


# --- rates


def resampled(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples at another rate: `[ceil(samples * wanted / rate)]` float32, the first at the same moment.

    Between the samples stands the sum of sinc functions that is the sound itself, each under a Kaiser window of 64 zero
    crossings on both sides; above 95 % of the lower of both Nyquist frequencies it fades away. One filter for each place
    that a new sample can have between two old ones (polyphase). The ratio of both rates is taken as the nearest fraction
    of whole numbers up to 2,000; all usual rates are such.
    """
    ratio = Fraction(wanted, rate).limit_denominator(_PHASES)
    up, down = ratio.numerator, ratio.denominator
    if up == down or not len(sound):
        return np.ascontiguousarray(sound, dtype=np.float32)
    filters, before = _filters(up, down)
    made = math.ceil(len(sound) * up / down)
    steps = math.ceil(made / up)  # each of `down` old samples and `up` new ones
    width = filters.shape[-1]
    after = max(0, (steps - 1) * down + width - before - len(sound))
    signal = F.pad(torch.from_numpy(np.ascontiguousarray(sound, dtype=np.float32)), (before, after))
    with torch.no_grad():
        parts = F.conv1d(signal[None, None], filters, stride=down)  # [1, up, steps]
    return parts[0].T.reshape(-1)[:made].contiguous().numpy()


@lru_cache(maxsize=8)
def _filters(up: int, down: int) -> tuple[torch.Tensor, int]:
    """Filters `[up, 1, width]` of the new samples of a step, and how many old samples before its first they read."""
    cut = _PASSED * min(1.0, up / down)  # of the old Nyquist frequency
    reach = math.ceil(_CROSSINGS / cut)
    old = torch.arange(-reach, reach + down + 1, dtype=torch.float64)
    new = torch.arange(up, dtype=torch.float64)[:, None] * (down / up)
    away = old - new  # in old samples
    window = torch.special.i0(_BETA * (1 - (away / reach).square()).clamp(min=0).sqrt())
    window = window / torch.special.i0(torch.tensor(_BETA, dtype=torch.float64)) * (away.abs() <= reach)
    return (torch.sinc(away * cut) * cut * window).float()[:, None], reach


SOUND = Medium("recording", ENDINGS, _look, check_soundfile)
