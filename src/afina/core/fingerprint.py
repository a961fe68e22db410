"""Which base an adapter was trained on (T16): class, sizes, and a few hundred of its weights.

The sample is compared with the tolerance of a 16-bit copy, so that loading the same base in another precision passes and
another base of the same shape does not. Quantised weights and modules that are trained whole are left out.
"""

from __future__ import annotations

from typing import Any

import torch

from afina.core.codecs import codec_of
from afina.core.injection import AdapterSet

__all__ = ["differences", "fingerprint"]

_TENSORS, _VALUES = 24, 6
_SIZES = ("hidden_size", "d_model", "n_embd", "num_hidden_layers", "num_layers", "n_layer", "num_attention_heads", "n_head")


def fingerprint(adapters: AdapterSet) -> dict[str, Any]:
    """Class, sizes and sampled weights of the bare model; as they were found before, where the weights are in shards now."""
    if adapters.base is not None:
        return adapters.base
    model = adapters.model
    config, text = _configs(model)
    tensors = _comparable(adapters)
    step = max(1, len(tensors) // _TENSORS)
    sample = {name: _values(tensors[name]) for name in sorted(tensors)[::step][: _TENSORS + 8]}
    return {
        "class": type(model).__name__,
        "model_type": getattr(config, "model_type", None),
        "text_type": getattr(text, "model_type", None),
        "sizes": {key: value for key in _SIZES if isinstance(value := getattr(text, key, None), int)},
        "weights": {name: values for name, values in sample.items() if values is not None},
    }


def differences(stored: dict[str, Any], adapters: AdapterSet, rename: tuple[str, str] = ("", "")) -> list[str]:
    """What differs between a stored fingerprint and this model; empty for the same base.

    `rename` is the change of prefix under which the adapter's keys were found in this model.
    """
    configs = _configs(adapters.model)
    types = [getattr(config, "model_type", None) for config in configs]
    found = []
    if stored.get("model_type") and not {stored["model_type"], stored.get("text_type")} & {*types}:
        found.append(f"it was trained on a {stored['model_type']} model, this is a {types[0]}")
    for key, value in stored.get("sizes", {}).items():
        if (here := getattr(configs[1], key, None)) != value:
            found.append(f"{key} was {value}, here it is {here}")
    tensors = _comparable(adapters)
    wrong, compared = [], 0
    for name, values in stored.get("weights", {}).items():
        old, new = rename
        name = new + name[len(old) :] if name.startswith(old) else name
        here = _values(tensors[name]) if name in tensors else None
        if here is None or len(here) != len(values):
            continue
        compared += 1
        a, b = torch.tensor(values), torch.tensor(here)
        if not torch.allclose(a, b, rtol=2**-6, atol=1e-6 + float(a.abs().max()) * 2**-8):
            wrong.append(name)
    if compared and len(wrong) > compared // 10:
        found.append(f"{len(wrong)} of {compared} sampled weights differ, for example {wrong[0]}")
    return found


def _configs(model: Any) -> tuple[Any, Any]:
    """Configuration of a model and, within it, that of its language model: a multimodal model holds both."""
    config: Any = getattr(model, "config", None)
    return config, config.get_text_config() if hasattr(config, "get_text_config") else config


def _comparable(adapters: AdapterSet) -> dict[str, torch.Tensor]:
    """Floating-point matrices of the bare model under their own names."""
    saved = [p for injected in adapters.injected.values() for p in injected.saved]
    tensors = {}
    for path, module in adapters.map.modules.items():
        if any(path == s or path.startswith(f"{s}.") for s in saved):
            continue
        for name, tensor in module._parameters.items():
            plain = tensor is not None and tensor.dtype.is_floating_point and tensor.dim() >= 2
            if plain and codec_of(module).name in ("plain", "opaque"):
                tensors[f"{path}.{name}"] = tensor
    return tensors  # type: ignore[return-value]


def _values(tensor: torch.Tensor) -> list[float] | None:
    if tensor.is_meta or type(tensor.data) is not torch.Tensor:  # no values, or a shard of them
        return None
    row = tensor.detach()[tensor.shape[0] // 3].flatten()  # rows early in the table: a resized vocabulary keeps them
    picked = row[:: max(1, row.numel() // _VALUES)][:_VALUES]
    return [round(float(v), 7) for v in picked.float()]
