"""A quantised model as a plain one: every layer with the floating-point values that it stands for.

That is the base an adapter was trained on, so merging onto it answers as the adapted model does, where merging onto the
weights from before quantisation does not quite (T18). It costs what the plain model costs.
"""

from __future__ import annotations

from typing import Any

import torch

from afina.core.adapted import AdaptedLayer
from afina.core.codecs.written_out import is_quantised, plain_layer
from afina.core.injection import AdapterSet

__all__ = ["dequantised"]

_SAID = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit")


@torch.no_grad()
def dequantised(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Put a plain linear layer in the place of every quantised one, also below adapters; returns `model`.

    `dtype` is that of the new weights; None: of the model's own embeddings. The configuration no longer says that it is
    quantised. Biases and everything else stay as they are.
    """
    dtype = dtype or _float_type(model)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, AdaptedLayer) or ".adapters." in f".{path}." or not is_quantised(module):
            continue
        parent, _, leaf = path.rpartition(".")
        holder = model.get_submodule(parent) if parent else model
        plain = plain_layer(module, dtype)
        holder._modules[leaf] = plain
        if isinstance(holder, AdaptedLayer):
            holder.view.becomes(plain)  # the adapters' too
    for name in _SAID:
        for held in (model, getattr(model, "model", None)):
            if held is not None and name in held.__dict__:
                del held.__dict__[name]
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    adapters = AdapterSet.of(model)
    if adapters is not None:
        adapters.forget_map()
    return model


def _float_type(model: Any) -> torch.dtype:
    table = model.get_input_embeddings().weight if hasattr(model, "get_input_embeddings") else None
    return table.dtype if table is not None and table.dtype.is_floating_point else torch.float32
