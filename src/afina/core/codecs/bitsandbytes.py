"""bitsandbytes' storages: int8 rows, and blocks of 4-bit values (nf4, fp4).

Its own layers cast their bias in place to whatever type comes in, keep activations for a backward that does not read them,
round activations to int8 with a warning a call, and repack 4-bit weights in place (T43). A layer that afina has loaded
itself is made `lean`: it computes from what is stored and leaves it as it is.

bitsandbytes 0.50 on CPUs reads 4-bit rows wrongly that hold no whole number of blocks (in_features of 32, 96, 160, ...: an
error of 24 % for 9 %, without a word); they are read here as the blocks that they are.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import sys
from typing import Any

import torch
from torch import nn

from afina.core.codecs.codec import WeightCodec
from afina.core.codecs.rows import compute_dtype, row_linear

__all__ = ["BitsAndBytes4Bit", "BitsAndBytesInt8"]

logger = logging.getLogger("afina")


class BitsAndBytesInt8(WeightCodec):
    """`bitsandbytes.nn.Linear8bitLt`: int8 rows with one scale each; value = CB * SCB / 127."""

    name = "bitsandbytes int8"

    def matches(self, layer: Any) -> bool:
        return _is(layer, "Linear8bitLt") and not layer.state.has_fp16_weights

    def lean(self, layer: Any) -> None:
        layer.__class__ = _lean("LeanLinear8bitLt")

    def read(self, layer: Any) -> torch.Tensor:
        if layer.weight.dtype != torch.int8:  # not quantised yet: bitsandbytes does it on the first move to a device
            return layer.weight  # type: ignore[no-any-return]
        return layer.weight.data.float() * _scale(layer)[:, None]

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
        if state is not None and not _whole_rows(layer.weight, state) and type(layer).__name__ != "LeanLinear4bit":
            logger.warning(
                "a Linear4bit of %d inputs in blocks of %d is read wrongly by bitsandbytes on a CPU; its outputs are right "
                "from here on", state.shape[-1], state.blocksize,
            )  # fmt: skip
            layer.__class__ = _lean("LeanLinear4bit")

    def lean(self, layer: Any) -> None:
        layer.__class__ = _lean("LeanLinear4bit")
        self.prepare(layer)

    def read(self, layer: Any) -> torch.Tensor:
        data, state = layer.weight.data, layer.weight.quant_state or layer.quant_state
        if state is None:  # not quantised yet
            return layer.weight  # type: ignore[no-any-return]
        if getattr(state, "packing_format_for_cpu", False):
            data, state = self._unpacked(data, state)
        return _blocks(data, state)

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


def _is(layer: nn.Module, name: str) -> bool:
    library = sys.modules.get("bitsandbytes")  # a layer of it exists only once it has been imported
    return library is not None and isinstance(layer, getattr(library.nn, name))


def _scale(layer: Any) -> torch.Tensor:
    """Scales `[out]` of int8 rows; bitsandbytes' own first forward moves them from the weight into the state."""
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return scale.float() / 127.0  # type: ignore[no-any-return]


def _forward_int8(self: Any, x: torch.Tensor) -> torch.Tensor:
    return row_linear(x, self.weight.data, _scale(self), self.bias)


def _whole_rows(data: torch.Tensor, state: Any) -> bool:
    """Whether bitsandbytes reads these 4-bit rows rightly."""
    return data.device.type != "cpu" or state.shape[-1] % state.blocksize == 0


def _blocks(data: torch.Tensor, state: Any) -> torch.Tensor:
    """The floating-point weight of packed blocks."""
    import bitsandbytes.functional as bnb

    if _whole_rows(data, state):
        return bnb.dequantize_4bit(data, state)
    shape, state = state.shape, copy.copy(state)
    count = math.prod(shape)
    blocks = -(-count // state.blocksize)
    flat = data.flatten().view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, blocks * state.blocksize // 2 - len(flat)))
    state.shape = torch.Size((blocks, state.blocksize))
    return bnb.dequantize_4bit(flat.reshape(-1, 1), state).flatten()[:count].reshape(shape)


class _BlockLinear(torch.autograd.Function):
    """x W.T with W made of packed blocks, in backward again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, data: torch.Tensor, state: Any) -> torch.Tensor:
        ctx.save_for_backward(data)
        ctx.state = state
        return torch.nn.functional.linear(x, _blocks(data, state).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (data,) = ctx.saved_tensors
        return grads[0] @ _blocks(data, ctx.state).to(grads[0].dtype), None, None


def _forward_4bit(self: Any, x: torch.Tensor) -> torch.Tensor:
    import bitsandbytes as bnb

    x = x.to(compute_dtype(x))
    bias = None if self.bias is None else self.bias.to(x.dtype)
    if not _whole_rows(self.weight, self.weight.quant_state):
        y: torch.Tensor = _BlockLinear.apply(x, self.weight.data, self.weight.quant_state)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return bnb.matmul_4bit(x, self.weight, bias=bias, quant_state=self.weight.quant_state)  # type: ignore[no-any-return]


@functools.cache
def _lean(name: str) -> Any:
    """bitsandbytes' layer with another forward; made once the library is there."""
    import bitsandbytes as bnb

    forward = {"LeanLinear8bitLt": _forward_int8, "LeanLinear4bit": _forward_4bit}[name]
    own = getattr(bnb.nn, name.removeprefix("Lean"))
    return type(name, (own,), {"forward": forward, "__module__": __name__, "__doc__": own.__doc__})


def __getattr__(name: str) -> Any:
    """The classes that `_lean` makes, under their names, for pickle."""
    if name in ("LeanLinear8bitLt", "LeanLinear4bit"):
        return _lean(name)
    raise AttributeError(name)
