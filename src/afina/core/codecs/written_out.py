"""Quantised layers as plain ones, with the floating-point values that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from afina.core.codecs import codec_of

__all__ = ["is_quantised", "plain_layer", "written_out"]


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer stores its weight in a form that rounds, and afina can read it."""
    codec = codec_of(layer)
    return not codec.exact and codec.name != "opaque"


@torch.no_grad()
def plain_layer(layer: Any, dtype: torch.dtype) -> nn.Module:
    """A layer with the values of a quantised one, in `dtype`; the bias is the same Parameter.

    A linear layer, or where transformers quantised GPT-2's transposed one, that again: a checkpoint has its form.
    """
    weight = codec_of(layer).read(layer)
    with torch.device("meta"):
        if getattr(getattr(layer, "source_cls", None), "__name__", "") == "Conv1D":
            made: nn.Module = layer.source_cls(weight.shape[0], weight.shape[1])
            weight = weight.T
        else:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    made.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
    if layer.bias is not None:
        made.bias = layer.bias
    return made.train(layer.training)


def written_out(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with every quantised layer in it, or itself, turned into a plain one."""
    if is_quantised(module):
        return plain_layer(module, dtype)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if is_quantised(child):
                parent._modules[name] = plain_layer(child, dtype)
    return module
