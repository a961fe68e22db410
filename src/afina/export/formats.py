"""The formats there are."""

from __future__ import annotations

from afina.errors import ConfigError, did_you_mean
from afina.export.format import Format
from afina.export.gguf import Gguf
from afina.export.gguf_adapter import GgufAdapter
from afina.export.int8 import Int8
from afina.export.lora_files import Diffusers, Kohya
from afina.export.merged import Merged
from afina.export.onnx import Onnx, OnnxInt8

__all__ = ["FORMATS", "find_format"]

_ALL: tuple[Format, ...] = (Merged(), Int8(), Onnx(), OnnxInt8(), Gguf(), GgufAdapter(), Diffusers(), Kohya())
FORMATS: dict[str, Format] = {made.name: made for made in _ALL}


def find_format(name: str) -> Format:
    """The format of that name; raises ConfigError with the nearest names."""
    if name not in FORMATS:
        raise ConfigError(f"--format {name} is no format.{did_you_mean(name, FORMATS)}")
    return FORMATS[name]
