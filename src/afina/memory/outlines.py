"""A model on the meta device as loading into quantised storage would leave it: see `core.codecs.outline`."""

from __future__ import annotations

from typing import Any

from torch import nn

from afina.core.codecs.outline import OutlineLinear
from afina.memory.loading import floating

__all__ = ["outlined", "untied"]


def untied(model: Any, path: str) -> None:
    """Gives the output head a table of its own where the checkpoint has one: its configuration says that the two are not
    tied, which transformers sets aside for some architectures (T5) until it sees the weights."""
    said, _ = model.config.get_config_dict(path)
    head = model.get_output_embeddings()
    if said.get("tie_word_embeddings") is False and head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())


def outlined(model: Any, kind: str) -> Any:
    """Puts outlines in the place of the layers that loading quantises to `kind`; returns the model."""
    kept = set(floating(model))
    for path, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            turned = type(layer).__name__ == "Conv1D" and kind != "int8_weight_only"  # which holds [in, out]
            if f"{path}.{name}".lstrip(".") in kept or not (type(layer) is nn.Linear or turned):
                continue
            n_out, n_in = reversed(layer.weight.shape) if turned else layer.weight.shape
            made = OutlineLinear(n_out, n_in, kind, layer.weight.dtype, layer.weight.device, layer.bias)
            made.requires_grad_(False)
            setattr(parent, name, made)
    return model
