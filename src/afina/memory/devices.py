"""What a device adds to a trace: how its allocator rounds, what its kernels take inside, which kernels it has.

A trace runs on fake tensors of a CPU whatever is planned for, since torch without CUDA cannot make others. `kernels_of`
makes the code see a GPU where it asks, and puts in what a GPU computes otherwise: fused attention, dropout with a mask of
bytes, and the operations that autocast computes in float32 there and not on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from afina.memory.allocators import Allocator, Heap, Pools
from afina.memory.heap import APART, KEPT, TRIMMED

__all__ = ["DEVICES", "allocator_of", "autocast_of", "backward", "hidden_of", "kernels_of", "overhead_of"]

DEVICES = ("cpu", "cuda")
_CONTEXT = 500_000_000  # bytes of a CUDA context with the kernels of torch and cuBLAS: 0.4 to 0.6 GB by card and version
_CUBLAS = 8_519_680  # bytes of cuBLAS' workspace, torch's default before Hopper (there 32 MiB)


def allocator_of(device: str, *, tight: bool = False) -> Allocator:
    """What tensors are taken from; `tight`: what is freed goes back at once (`heap.py`)."""
    if device == "cuda":
        return Pools()
    return Heap(APART, TRIMMED) if tight else Heap(KEPT)


def overhead_of(device: str) -> dict[str, int]:
    """What is there before the first tensor, by name."""
    return {"CUDA context and kernels": _CONTEXT, "cuBLAS workspace": _CUBLAS} if device == "cuda" else {}


def autocast_of(precision: str) -> AbstractContextManager[Any]:
    """Autocast for a trace: fp32 has none."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast("cpu", dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


# --- inside of kernels

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


def hidden_of(device: str) -> Callable[[Any, Sequence[Any], Any], int]:
    """Bytes that an operation takes inside itself, from the operation, the tensors it is given and its result."""
    return _hidden_cpu if device == "cpu" else _hidden_cuda


def _hidden_cpu(operation: Any, given: Sequence[Any], result: Any) -> int:
    """oneDNN, which multiplies 16-bit matrices, copies the weight into its own order first."""
    name = operation._schema.name.partition("::")[2]
    if name in _PRODUCTS and given and given[-1].dtype == torch.bfloat16:
        return max(_bytes(t) for t in given[-2:])
    return 0


def _hidden_cuda(operation: Any, given: Sequence[Any], result: Any) -> int:
    return 0


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- kernels

_FLOAT32 = {
    F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.group_norm, F.mse_loss, F.softplus,
    torch.softmax, torch.log_softmax, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.sum, torch.cumsum, torch.norm,
    torch.Tensor.softmax, torch.Tensor.log_softmax, torch.Tensor.exp, torch.Tensor.log, torch.Tensor.pow,
    torch.Tensor.rsqrt, torch.Tensor.sum, torch.Tensor.cumsum, torch.Tensor.norm,
}  # fmt: skip


@contextmanager
def kernels_of(device: str) -> Any:
    """Within this, code that is traced runs as on the device; tensors asked for their contents answer with what is known of
    them, or zeros."""
    own, FakeTensor.tolist = FakeTensor.tolist, _listed  # type: ignore[assignment,method-assign]
    try:
        with _Contents(), _Gpu() if device == "cuda" else nullcontext():
            yield
    finally:
        FakeTensor.tolist = own  # type: ignore[method-assign]


def backward(loss: torch.Tensor) -> None:
    """`loss.backward()` with `kernels_of` still in force, so that blocks computed again are computed as before; torch sets
    function modes aside while `backward` itself runs."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Contents(TorchFunctionMode):
    """Answers where contents leave torch as arrays."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.numpy and isinstance(args[0], FakeTensor):
            return _array(args[0])
        return func(*args, **(kwargs or {}))


def _listed(tensor: Any) -> Any:
    return _array(tensor).tolist()


def _array(tensor: Any) -> Any:
    known = getattr(tensor, "value", None)
    if known is None:
        kind = str(tensor.dtype).removeprefix("torch.").replace("bfloat16", "float32")
        return np.zeros(tuple(tensor.shape), kind)
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        return known.numpy()


class _Gpu(TorchFunctionMode):
    """A GPU's kernels, on fake tensors of a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func in _ASKED:
            return _ASKED[func]
        if func in _FLOAT32 and torch.is_autocast_enabled("cpu") and args and isinstance(args[0], torch.Tensor):
            if args[0].dtype in (torch.bfloat16, torch.float16):
                args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


_ASKED = {torch.Tensor.is_cpu.__get__: False, torch.Tensor.is_cuda.__get__: True}  # type: ignore[attr-defined]


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The flash kernel where there is no mask and 16 bits, else the memory-efficient one: neither keeps the scores."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if query.shape[1] != key.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(  # type: ignore[no-any-return]
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask, 0)
        size = (*query.shape[:-1], key.shape[-2])
        attn_mask = attn_mask.to(query.dtype).expand(size)
    kept = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, attn_mask, kept, dropout_p, is_causal, scale=scale
    )[0]
