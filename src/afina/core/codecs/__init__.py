"""How a layer stores its weight: one row of a table per storage.

A codec reads the stored weight as a float tensor and writes a float tensor back in the same storage, in the layer's own
orientation. No method knows that a base is quantised. A write never touches the stored tensor: it puts a new Parameter
in its place, so that the old one (tied weights, exact unmerge) stays as it was.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from afina.core.codecs.bitsandbytes import BitsAndBytes4Bit, BitsAndBytesInt8
from afina.core.codecs.codec import WeightCodec
from afina.core.codecs.outline import Outlined
from afina.core.codecs.packed import Grouped
from afina.core.codecs.plain import Opaque, Plain
from afina.core.codecs.torchao import TorchAOInt8

__all__ = ["CODECS", "WeightCodec", "codec_of", "logical_numel", "restore", "snapshot", "stored_bytes"]

_KNOWN: tuple[WeightCodec, ...] = (BitsAndBytesInt8(), BitsAndBytes4Bit(), TorchAOInt8(), Grouped(), Plain())
CODECS: tuple[WeightCodec, ...] = (*_KNOWN, Outlined(), Opaque(_KNOWN))


def codec_of(layer: nn.Module) -> WeightCodec:
    """The first row of the table that matches."""
    return next(codec for codec in CODECS if codec.matches(layer))


def logical_numel(parameter: torch.Tensor) -> int:
    """How many values a stored parameter stands for: a packed 4-bit weight holds more than it has elements."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def stored_bytes(model: nn.Module) -> int:
    """Bytes of everything a model holds, quantised weights with their scales, each storage once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    for module in model.modules():
        scale = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scale, torch.Tensor):
            seen[scale.untyped_storage().data_ptr()] = scale.untyped_storage().nbytes()
    return sum(seen.values())


def _parts(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors that one stored tensor consists of."""
    if type(tensor).__module__.startswith("torchao."):
        names = (*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", ()))
        return [part for name in names if (part := getattr(tensor, name, None)) is not None]
    parts, state = [tensor.data], getattr(tensor, "quant_state", None)
    while state is not None:
        parts += [part for name in ("absmax", "code", "offset") if (part := getattr(state, name, None)) is not None]
        state = state.state2 if state.nested else None
    if isinstance(getattr(tensor, "SCB", None), torch.Tensor):
        parts.append(tensor.SCB)
    return parts


def snapshot(layer: nn.Module) -> dict[str, Any]:
    """The stored form itself (Parameter objects and quantisation state), for an exact way back; nothing is copied."""
    kept: dict[str, Any] = dict(layer._parameters)
    return kept | {name: layer.__dict__[name] for name in ("state", "quant_state") if name in layer.__dict__}


def restore(layer: nn.Module, kept: dict[str, Any]) -> None:
    """Put a `snapshot` back: the same objects, so the same bits and the same ties."""
    for name, value in kept.items():
        (layer._parameters if name in layer._parameters else layer.__dict__)[name] = value
