"""Loading a checkpoint straight into quantised form, tensor by tensor: what is held at most is what stays, and the
workspace of quantising the largest tensor.

transformers quantises each tensor as it is read, but maps the whole checkpoint into memory, where its pages count until the
end, and leaves the heap in pieces. Here tensors are read when they are quantised and given back at once.

What stays in floating point: what lies outside the model proper (heads of tasks, which are trained), what puts out the
logits, what shares its weight with an embedding, and everything that is no linear layer.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from afina.core.codecs import codec_of
from afina.errors import MissingDependencyError
from afina.memory.measure import release

__all__ = [
    "READ_AS_TABLES", "READ_BEFORE_TIDYING", "check_library", "device_of_process", "floating", "load_quantised",
    "tensor_by_tensor",
]  # fmt: skip

READ_BEFORE_TIDYING = 32 << 20  # bytes that are read before what was let go is given back
READ_AS_TABLES = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")  # linear layers of LayoutLMv3 that are never called
_LIBRARIES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8_weight_only": "torchao"}
_CAST_TO_WEIGHT = {"wo"}  # kept in float32 by transformers where float16 would overflow; here sums are wider


def check_library(weights: str) -> None:
    """Raise MissingDependencyError where the library that quantises to `weights` is not installed."""
    library = _LIBRARIES.get(weights)
    if library is not None and importlib.util.find_spec(library) is None:
        raise MissingDependencyError(library, library, f"memory.weights={weights}")


def load_quantised(auto: Any, path: str, weights: str, dtype: torch.dtype, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model of one of transformers' Auto classes with its linear layers quantised, and what loading found.

    `weights` is int8, nf4, fp4 (bitsandbytes) or int8_weight_only (torchao); `dtype` is that of what stays in floating
    point. The model lies on the accelerator of this process where there is one. Raises MissingDependencyError before
    anything is read or fetched.
    """
    from transformers import AutoConfig

    check_library(weights)
    with _quietly():
        if getattr(AutoConfig.from_pretrained(path), "quantization_config", None) is None:  # else it says itself how it is
            settings["quantization_config"] = _quantisation(weights)
        with tensor_by_tensor(), _keeping_floats():
            model, info = auto.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, dtype=dtype,
                device_map={"": device_of_process()}, **settings,
            )  # fmt: skip
    make_lean(model)
    return model, info


def make_lean(model: nn.Module) -> None:
    """Let every quantised layer compute from what is stored, leave it as it is, and keep no copy for backward."""
    for module in model.modules():
        codec_of(module).lean(module)
        if getattr(module, "compute_type_is_set", None) is not None:
            module.compute_dtype, module.compute_type_is_set = None, True  # type: ignore[assignment]


def _quantisation(weights: str) -> Any:
    if weights == "int8_weight_only":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if weights == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=weights, bnb_4bit_use_double_quant=False,
        bnb_4bit_quant_storage=torch.int8,  # some models cast activations to a weight's type, and know int8 as an exception
    )  # fmt: skip


def device_of_process() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


def floating(model: Any, stored: set[str] | None = None) -> list[str]:
    """Paths of the linear layers that stay in floating point whatever the others are stored as.

    `stored`: names of the tensors in the checkpoint; a pooler that is not among them is made anew and stays, too.
    """
    prefix = model.base_model_prefix
    trunk = getattr(model, prefix, None) if prefix else None
    inside = {id(m) for m in trunk.modules()} if isinstance(trunk, nn.Module) else {id(m) for m in model.modules()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {key.removesuffix(".weight") for pair in ties.items() for key in pair}
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ()), *READ_AS_TABLES} - _CAST_TO_WEIGHT
    names = []
    for name, module in model.named_modules():
        if type(module).__name__ not in ("Linear", "Conv1D"):
            continue
        new = ".pooler." in f".{name}." and stored is not None and not any(k.endswith(_tail(name)) for k in stored)
        listed = any(part in kept for part in name.split("."))
        shared = name in tied or id(module._parameters["weight"]) in tables
        if id(module) not in inside or module is output or shared or new or listed:
            names.append(name)
    return names


def _tail(name: str) -> str:
    """The end of a checkpoint's key that must be there for a pooler's layer."""
    return name[name.rindex("pooler.") :] + ".weight"


# --- how transformers reads


@contextlib.contextmanager
def tensor_by_tensor() -> Iterator[None]:
    """Checkpoints are read tensor by tensor within this, not mapped as a whole, and what was freed goes back at once."""
    import transformers.modeling_utils as reading

    mapped = reading.safe_open
    tidy = _Tidy()

    def read(*args: Any, **kwargs: Any) -> Any:
        return _Watched(mapped(*args, **{**kwargs, "backend": "pread"}), tidy)

    reading.safe_open = read  # type: ignore[assignment,misc]
    gc.freeze()  # what is there already need not be looked at again and again
    try:
        yield
    finally:
        reading.safe_open = mapped  # type: ignore[misc]
        release(torch.device("cpu"))
        gc.unfreeze()


class _Tidy:
    """Gives memory back whenever so many bytes were read."""

    def __init__(self, every: int = READ_BEFORE_TIDYING):
        self.every, self.left = every, every

    def __call__(self, amount: int) -> None:
        self.left -= amount
        if self.left <= 0:
            self.left = self.every
            release(torch.device("cpu"))  # libraries leave what they have quantised in cycles, and the heap in pieces


class _Watched:
    """A safetensors file, or one tensor of it that is not read yet; `tidy` is told how many bytes are read."""

    def __init__(self, inner: Any, tidy: _Tidy):
        self.inner, self.tidy = inner, tidy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __exit__(self, *error: Any) -> Any:
        return self.inner.__exit__(*error)

    def get_slice(self, name: str) -> _Watched:
        """One tensor, to be read when it is asked for by `[...]`."""
        return _Watched(self.inner.get_slice(name), self.tidy)

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self.inner[index]
        self.tidy(tensor.numel() * tensor.element_size())
        return tensor


@contextlib.contextmanager
def _keeping_floats() -> Iterator[None]:
    """transformers' quantisers leave out what `floating` names within this."""
    from transformers.quantizers.base import HfQuantizer

    before = HfQuantizer.__dict__["get_modules_to_not_convert"]

    def chosen(model: Any, *_: Any, **__: Any) -> list[str]:
        return [f"^{re.escape(name)}" for name in floating(model)] or ["^$"]

    HfQuantizer.get_modules_to_not_convert = staticmethod(chosen)  # type: ignore[assignment]
    try:
        yield
    finally:
        HfQuantizer.get_modules_to_not_convert = before  # type: ignore[method-assign]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Libraries that tell of kernels they do not find are not heard within this."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
