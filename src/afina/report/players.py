"""Recordings of test rows on the page, to be listened to: the first seconds of each, and part of the file."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

from afina.report.markup import Markup, cut, el

__all__ = ["player"]

_SAMPLES = 160_000  # of a recording at most, and as many 16-bit numbers on the page: ten seconds of speech at 16 kHz


def player(path: str) -> Markup:
    """The recording over the end of its path; the path alone where it is no longer there, or cannot be read here."""
    name = "/".join(Path(path).parts[-2:])
    try:
        held, seconds = _wave(path)
    except (ImportError, RuntimeError, OSError, TypeError) as error:  # soundfile's own are RuntimeErrors
        gone = not os.path.isfile(path)
        why = "the file is no longer there" if gone else cut(" ".join(str(error).split()), 120) or type(error).__name__
        return el("p", cut(path, 280), el("span", f" (not to be heard: {why})", class_="soft"), class_="text", dir="auto")
    source = f"data:audio/wav;base64,{base64.b64encode(held).decode()}"
    said = f"{cut(name, 80)}, the first {seconds:.1f} seconds" if seconds else cut(name, 80)
    heard = el("audio", controls="controls", preload="none", src=source, aria_label=f"the recording {cut(name, 80)}")
    return el("figure", heard, el("figcaption", said, dir="auto", title=path))


def _wave(path: str) -> tuple[bytes, float]:
    """The beginning as a WAV file of one channel and 16 bits; its seconds where that is not all of it."""
    import soundfile  # not by data/sounds.py: a page is made without torch

    with soundfile.SoundFile(path) as file:
        sound = file.read(_SAMPLES, dtype="float32", always_2d=True).mean(axis=1)
        rate, cut_off = file.samplerate, file.frames > len(sound)
    held = io.BytesIO()
    soundfile.write(held, sound, rate, format="WAV", subtype="PCM_16")
    return held.getvalue(), len(sound) / rate if cut_off else 0.0
