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
from afina.core.codecs.packed import Grouped, PackedLinear
from afina.core.codecs.plain import Opaque, Plain
from afina.core.codecs.torchao import TorchAOInt8

__all__ = ["CODECS", "WeightCodec", "codec_of", "counted", "logical_numel", "restore", "snapshot", "stored_bytes"]

_KNOWN: tuple[WeightCodec, ...] = (BitsAndBytesInt8(), BitsAndBytes4Bit(), TorchAOInt8(), Grouped(), Plain())
CODECS: tuple[WeightCodec, ...] = (*_KNOWN, Outlined(), Opaque(_KNOWN))


def codec_of(layer: nn.Module) -> WeightCodec:
    """The first row of the table that matches."""
    return next(codec for codec in CODECS if codec.matches(layer))


def logical_numel(module: nn.Module, name: str) -> int:
    """How many values the parameter `name` of `module` stands for: packed integers for more than there are of them, the
    scales and zeros beside them for none."""
    parameter: Any = module._parameters[name]
    if isinstance(module, PackedLinear) and name != "bias":
        return module.in_features * module.out_features if name == "weight" else 0
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else int(parameter.numel())


def counted(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Each parameter once, with how many values it stands for."""
    found: dict[int, tuple[nn.Parameter, int]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in found:
                found[id(parameter)] = parameter, logical_numel(module, name)
    return list(found.values())


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
