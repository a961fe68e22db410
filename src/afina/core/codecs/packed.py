"""Layers of checkpoints that were quantised in groups before: GPTQ, AWQ and HQQ, computed from what the file holds.

value = (q - zero) * scale, a scale and a zero for each group of inputs. What differs is how the integers lie in memory:

gptq  int32 `[in * bits / 32, out]`, inputs from the lowest bits up; zeros `[groups, out * bits / 32]` less one (version 1 of
      the format); `g_idx` `[in]` names the group of each input
awq   int32 `[in, out / 8]` of 4 bits, outputs in the order 0 2 4 6 1 3 5 7; zeros alike; groups of inputs in a row
hqq   bytes; a 4-bit byte holds a value of the first half of the groups and one of the second; scales and zeros are floats

No library is needed. The weight is written out in forward and again in backward, and never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from afina.core.codecs.codec import WeightCodec
from afina.core.codecs.rows import compute_dtype

__all__ = ["Grouped", "PackedLinear"]

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


class PackedLinear(nn.Linear):
    """A linear layer in groups. `weight`, `qzeros`, `scales` and, for gptq, `g_idx` are the tensors of the checkpoint."""

    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    def __init__(
        self, n_in: int, n_out: int, *, kind: str, bits: int, group_size: int, bias: bool, less_one: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind, self.bits = n_in, n_out, kind, bits
        self.group_size = n_in if group_size in (-1, None) else group_size
        self.less_one = less_one  # zeros are stored less one
        groups, each = -(-n_in // self.group_size), 32 // bits
        half = torch.float16
        if kind == "hqq":
            count = n_in * n_out // self.group_size
            self._hold("weight", count * bits // 8, self.group_size, dtype=torch.uint8)
            self._hold("scales", count, 1, dtype=half)
            self._hold("qzeros", count, 1, dtype=half)
        else:
            packed = (n_in // each, n_out) if kind == "gptq" else (n_in, n_out // each)
            self._hold("weight", *packed, dtype=torch.int32)
            self._hold("qzeros", groups, n_out // each, dtype=torch.int32)
            self._hold("scales", groups, n_out, dtype=half)
        if kind == "gptq":
            self._hold("g_idx", n_in, dtype=torch.int32)
        self.register_parameter("bias", nn.Parameter(torch.empty(n_out), requires_grad=False) if bias else None)

    def _hold(self, name: str, *shape: int, dtype: torch.dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False))

    def held(self) -> list[torch.Tensor]:
        """What the weight is made of."""
        return [p for name, p in self._parameters.items() if name != "bias" and p is not None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(compute_dtype(x))
        y: torch.Tensor = _Product.apply(x, self, *self.held())  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}, {self.bits} bits, groups of {self.group_size}"

    # --- integers and groups

    def steps(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Integers, zeros and scales, each broadcast to `[in, out]` (hqq: `[groups, group_size]`)."""
        weight, scales = self.weight, self.scales
        if self.kind == "hqq":
            values = weight if self.bits == 8 else torch.cat([weight >> 4, weight & 15])
            return values, self.qzeros, scales
        index = self._group()
        if self.kind == "gptq":
            values = _unpacked(weight.T, self.bits).T
            zeros = _unpacked(self.qzeros, self.bits) + int(self.less_one)
        else:
            values, zeros = (_turned(_unpacked(t, self.bits), _AWQ) for t in (weight, self.qzeros))
        return values, zeros[index], scales[index]

    def _group(self) -> torch.Tensor:
        """Number of the group of each input."""
        if self.kind == "gptq":
            return self.g_idx.long()
        return torch.arange(self.in_features, device=self.weight.device) // self.group_size

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[out, in]`."""
        values, zeros, scales = self.steps()
        weight = (values.to(dtype) - zeros.to(dtype)) * scales.to(dtype)
        return weight.reshape(self.out_features, self.in_features) if self.kind == "hqq" else weight.T

    def store(self, weight: torch.Tensor) -> None:
        """Put `weight` `[out, in]` into new tensors. Groups that fit into their scale keep it."""
        most = 2**self.bits - 1
        if self.kind == "hqq":
            flat = weight.float().reshape(-1, self.group_size)
            values, zeros, scales = _steps_of(flat, self.qzeros.float(), self.scales.float(), most, 1)
            packed = values if self.bits == 8 else (values[: len(values) // 2] << 4) | values[len(values) // 2 :]
            self._put(weight=packed.to(torch.uint8), qzeros=zeros, scales=scales)
            return
        wide, index, scales = weight.float().T, self._group(), self.scales
        _, old, _ = self.steps()
        groups = scales.shape[0]
        first = torch.stack([(index == g).nonzero()[0, 0] for g in range(groups)])
        lowest = int(self.less_one)
        made_zeros, made_scales = old[first].float(), scales.float().clone()
        values = torch.empty(wide.shape, dtype=torch.int32, device=wide.device)
        for g in range(groups):
            rows = index == g
            part, zero, scale = _steps_of(wide[rows], made_zeros[g][None], made_scales[g][None], most, 0, lowest)
            values[rows], made_zeros[g], made_scales[g] = part, zero[0], scale[0]
        whole = made_zeros.to(torch.int32) - lowest
        if self.kind == "gptq":
            packed, zeros = _packed(values.T, self.bits).T.contiguous(), _packed(whole, self.bits)
        else:
            back = sorted(range(8), key=_AWQ.__getitem__)
            packed, zeros = (_packed(_turned(t, back), self.bits) for t in (values, whole))
        self._put(weight=packed, qzeros=zeros, scales=made_scales)

    def _put(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            old: Any = self._parameters[name]
            self._parameters[name] = nn.Parameter(tensor.to(old.device, old.dtype).contiguous(), requires_grad=False)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear, *held: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.count = layer, len(held)
        return linear(x, layer.value(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.layer.value(grads[0].dtype), None, *[None] * ctx.count


class Grouped(WeightCodec):
    """A `PackedLinear`."""

    name = "groups of integers"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, PackedLinear)

    def read(self, layer: Any) -> torch.Tensor:
        return layer.value(torch.float32)  # type: ignore[no-any-return]

    def write(self, layer: Any, weight: torch.Tensor) -> None:
        layer.store(weight.detach())


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 `[n, m]` to the values in it `[n, m * 32 / bits]`, lowest bits first."""
    shifts = torch.arange(0, 32, bits, device=packed.device, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The reverse of `_unpacked`."""
    shifts = torch.arange(0, 32, bits, device=values.device, dtype=torch.int64)
    parts = values.to(torch.int64).unflatten(-1, (-1, 32 // bits)) << shifts
    whole = parts.sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


def _turned(values: torch.Tensor, order: Any) -> torch.Tensor:
    """Each eight values in another order: value i of the result's eight was at the place where `order` has i."""
    place = torch.tensor([order.index(i) for i in range(8)], device=values.device)
    return values.unflatten(-1, (-1, 8))[..., place].flatten(-2)


def _steps_of(
    part: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, most: int, dim: int, lowest: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers, zeros and scales for groups along `dim`; where values fit into the present ones, these stay."""
    values = (part / scale + zero).round()
    fits = ((values >= 0) & (values <= most)).all(dim, keepdim=True)
    low, high = part.amin(dim, keepdim=True).clamp(max=0), part.amax(dim, keepdim=True).clamp(min=0)
    fresh = ((high - low) / (most - lowest)).clamp(min=1e-6).half().float()
    scale = torch.where(fits, scale, fresh)
    zero = torch.where(fits, zero, (-low / fresh).round().clamp(lowest, most))
    return (part / scale + zero).round().clamp(0, most).to(torch.int32), zero, scale
