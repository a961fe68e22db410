"""How a layer stores its weight: one row of a table per storage.

A codec reads the stored weight as a float tensor and writes a float tensor back in the same storage, in the layer's own
orientation. No method knows that a base is quantised. A write never touches the stored tensor: it puts a new Parameter
in its place, so that the old one (tied weights, exact unmerge) stays as it was.
"""

from __future__ import annotations

import copy
import math
import sys
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from afina.errors import MergeError

__all__ = ["CODECS", "WeightCodec", "codec_of", "logical_numel", "restore", "snapshot"]


class WeightCodec(ABC):
    """One storage of weights."""

    name: str
    exact: bool = False  # reading after writing gives back the written values, up to the storage's dtype

    @abstractmethod
    def matches(self, layer: nn.Module) -> bool:
        """Whether `layer` keeps its weight in this storage."""

    @abstractmethod
    def read(self, layer: nn.Module) -> torch.Tensor:
        """The weight in floating point, shaped as the plain layer would hold it."""

    def prepare(self, layer: nn.Module) -> None:  # noqa: B027 (most storages need nothing)
        """Make a layer ready to be adapted."""

    @abstractmethod
    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        """Store `weight` (floating point, shaped as `read` returns it) in a new Parameter."""


class Plain(WeightCodec):
    """A floating-point Parameter named `weight`."""

    name, exact = "plain", True

    def matches(self, layer: nn.Module) -> bool:
        weight = layer._parameters.get("weight")
        return weight is not None and weight.dtype.is_floating_point and type(weight) is nn.Parameter

    def read(self, layer: nn.Module) -> torch.Tensor:
        return layer._parameters["weight"]  # type: ignore[return-value]

    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        old = layer._parameters["weight"]
        assert old is not None
        layer._parameters["weight"] = nn.Parameter(weight.to(old.device, old.dtype).contiguous(), requires_grad=False)


class Opaque(WeightCodec):
    """A storage afina cannot look into (DTensor shards, quantised formats without a row here): used, never merged."""

    name = "opaque"

    def matches(self, layer: nn.Module) -> bool:
        return True

    def read(self, layer: nn.Module) -> torch.Tensor:
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point:
            return weight
        raise MergeError(
            f"the weight of this {type(layer).__name__} is stored in a form afina cannot read; "
            f"known storages: {', '.join(codec.name for codec in CODECS[:-1])}"
        )

    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        raise MergeError(f"the weight of this {type(layer).__name__} is stored in a form afina cannot write")


class BitsAndBytesInt8(WeightCodec):
    """`bitsandbytes.nn.Linear8bitLt`: int8 rows with one scale each; value = CB * SCB / 127."""

    name = "bitsandbytes int8"

    def matches(self, layer: Any) -> bool:
        return _is(layer, "Linear8bitLt") and not layer.state.has_fp16_weights

    def read(self, layer: Any) -> torch.Tensor:
        weight, state = layer.weight, layer.state
        if weight.dtype != torch.int8:  # not quantised yet: bitsandbytes does it on the first move to a device
            return weight
        scale = weight.SCB if weight.SCB is not None else state.SCB  # the first forward moves it into the state
        return weight.data.float() * (scale.float()[:, None] / 127.0)

    def write(self, layer: Any, weight: torch.Tensor) -> None:
        import bitsandbytes as bnb

        old, half = layer.weight, weight.detach().to("cpu", torch.float16)
        made: Any = bnb.nn.Int8Params(half, requires_grad=False, has_fp16_weights=False)
        layer._parameters["weight"] = made.to(old.device)
        layer.state = copy.copy(layer.state)  # the old state stays with the old Parameter
        layer.state.CB = layer.state.SCB = None


class BitsAndBytes4Bit(WeightCodec):
    """`bitsandbytes.nn.Linear4bit`: blocks of nf4 or fp4 values with one scale each.

    On a CPU with avx512_bf16 the first eval forward repacks weight and scales in place; bitsandbytes' own dequantise
    then reads garbage and a later backward gives no gradient (T43). An adapted layer is kept from repacking, and one that
    was repacked before is read through a copy with the repacking undone.
    """

    name = "bitsandbytes 4-bit"

    def matches(self, layer: Any) -> bool:
        return _is(layer, "Linear4bit")

    def prepare(self, layer: Any) -> None:
        layer.support_avx512bf16_for_cpu = False
        state = layer.weight.quant_state
        if state is not None and getattr(state, "packing_format_for_cpu", False):
            layer.weight.data, state = self._unpacked(layer.weight.data, state)
            layer.weight.quant_state = layer.quant_state = state

    def read(self, layer: Any) -> torch.Tensor:
        import bitsandbytes.functional as bnb

        data, state = layer.weight.data, layer.weight.quant_state or layer.quant_state
        if state is None:  # not quantised yet
            return layer.weight
        if getattr(state, "packing_format_for_cpu", False):
            data, state = self._unpacked(data, state)
        return bnb.dequantize_4bit(data, state)

    @staticmethod
    def _unpacked(data: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        import bitsandbytes.functional as bnb

        state = copy.copy(state)
        scales = state.absmax.T.reshape(-1).float()
        state.original_nested = False  # the scales are plain already: nothing to fold back into two levels
        data, state = bnb._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = scales
        return data, state

    def write(self, layer: Any, weight: torch.Tensor) -> None:
        import bitsandbytes as bnb

        old = layer.weight
        state = old.quant_state or layer.quant_state
        dtype = getattr(state, "original_dtype", None) or state.dtype
        new = bnb.nn.Params4bit(
            weight.detach().to("cpu", dtype).contiguous(),
            requires_grad=False,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            quant_storage=old.dtype,
            compress_statistics=bool(state.nested or getattr(state, "original_nested", False)),
            module=layer,
        )
        layer._parameters["weight"] = new.to(old.device)  # type: ignore[misc]


CODECS: tuple[WeightCodec, ...] = (BitsAndBytesInt8(), BitsAndBytes4Bit(), Plain(), Opaque())


def codec_of(layer: nn.Module) -> WeightCodec:
    """The first row of the table that matches."""
    return next(codec for codec in CODECS if codec.matches(layer))


def logical_numel(parameter: torch.Tensor) -> int:
    """How many values a stored parameter stands for: a packed 4-bit weight holds more than it has elements."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def snapshot(layer: nn.Module) -> dict[str, Any]:
    """The stored form itself (Parameter objects and quantisation state), for an exact way back; nothing is copied."""
    kept: dict[str, Any] = {name: layer._parameters[name] for name in ("weight", "bias") if name in layer._parameters}
    return kept | {name: layer.__dict__[name] for name in ("state", "quant_state") if name in layer.__dict__}


def restore(layer: nn.Module, kept: dict[str, Any]) -> None:
    """Put a `snapshot` back: the same objects, so the same bits and the same ties."""
    for name, value in kept.items():
        (layer._parameters if name in layer._parameters else layer.__dict__)[name] = value


def _is(layer: nn.Module, name: str) -> bool:
    library = sys.modules.get("bitsandbytes")  # a layer of it exists only once it has been imported
    return library is not None and isinstance(layer, getattr(library.nn, name))
