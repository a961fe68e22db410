"""Beginnings that need more than the layer: they see the floating-point weight of the checkpoint, layer by layer.

A beginning is a row of a table, named by `init_lora_weights`. It fills adapters before they are put into the model; the base
stays as it is, so that the adapter that is saved applies to the base as anyone loads it.

LoftQ (Li et al. 2023, https://arxiv.org/abs/2310.08659) looks for a quantised weight Q and factors B A with Q + B A close to
the weight W before quantisation. It alternates between quantising what B A leaves over and factoring what Q leaves over;
from its second quantisation on, Q is no longer what loading W gives. With the base as it is loaded there is one step, and
it is the best there is: the singular vectors of W - Q give the closest matrix of rank r (Eckart and Young 1936). Cost: one
decomposition a layer, W of one layer at a time in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from afina.core.codecs import codec_of
from afina.core.codecs.written_out import is_quantised
from afina.core.layers import LayerView
from afina.errors import ConfigError, Problems, shortened

__all__ = ["BEGINNINGS", "FloatWeights", "begin"]

_BITS = {"bitsandbytes int8": 8, "torchao int8": 8, "bitsandbytes 4-bit": 4}


class FloatWeights:
    """The weights of a checkpoint before quantisation, read tensor by tensor from its safetensors files.

    Raises ConfigError where the model does not come from such files, or they are quantised themselves.
    """

    def __init__(self, model: Any, purpose: str):
        self.purpose, self.name = purpose, str(getattr(model, "name_or_path", "") or "")
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.files = self._find()

    def _find(self) -> dict[str, Path]:
        """Names of tensors and the file of each."""
        from safetensors import safe_open
        from transformers.utils import cached_file

        def found(name: str) -> Path | None:
            path = cached_file(self.name, name, _raise_exceptions_for_missing_entries=False) if self.name else None
            return Path(path) if path else None

        index = found("model.safetensors.index.json")
        single = found("model.safetensors")
        if index is not None:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {file: found(file) for file in dict.fromkeys(places.values())}
            return {name: files[file] for name, file in places.items() if files[file] is not None}  # type: ignore[misc]
        if single is not None:
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        raise ConfigError(
            f"{self.purpose} needs the weights from before quantisation, and {self.name or 'this model'} has no "
            "model.safetensors to read them from; begin with init_lora_weights=True"
        )

    def name_of(self, path: str, leaf: str = "weight") -> str | None:
        """The checkpoint's name of a tensor of a module, whose head may have added or taken away a prefix."""
        names = (path, self.prefix + path, path.removeprefix(self.prefix))
        return next((f"{name}.{leaf}" for name in names if f"{name}.{leaf}" in self.files), None)

    def read(self, path: str, view: LayerView) -> torch.Tensor:
        """The canonical weight `[out, in]` of a layer, float32. Raises ConfigError where it is not as expected."""
        from safetensors import safe_open

        name = self.name_of(path)
        assert name is not None
        with safe_open(self.files[name], framework="pt") as opened:
            weight: torch.Tensor = opened.get_tensor(name)
        if getattr(getattr(view.layer, "source_cls", None), "__name__", "") == "Conv1D":
            weight = weight.T
        if tuple(weight.shape) != view.weight_shape or not weight.is_floating_point():
            raise ConfigError(
                f"{self.purpose}: {name} of {self.name} is {weight.dtype} {list(weight.shape)}, and the layer {path} is "
                f"{list(view.weight_shape)}: it is no weight from before quantisation. Begin with init_lora_weights=True"
            )
        return weight.to(view.device, torch.float32)


Built = Sequence[tuple[Any, LayerView, Any]]  # placement, view, adapter


def loftq(model: Any, config: Any, built: Built) -> None:
    """Fill the factors with the best approximation of what quantisation took from each weight."""
    chosen = [(p.path, view, adapter) for p, view, adapter in built if hasattr(adapter, "approximate")]
    chosen = [entry for entry in chosen if entry[1].kind == "linear" and is_quantised(entry[1].layer)]
    purpose, problems = "init_lora_weights='loftq'", Problems("LoraConfig")
    if not chosen:
        raise ConfigError(
            f"{purpose} makes up for quantisation, and none of the adapted layers is quantised; load the base in nf4 or "
            "int8, or begin with init_lora_weights=True"
        )
    bits = (config.loftq_config or {}).get("loftq_bits")
    stored = {_BITS.get(codec_of(view.layer).name) for _, view, _ in chosen}
    if bits is not None and stored != {bits}:
        said = " and ".join(str(b) for b in sorted(b for b in stored if b))
        problems.add(f"loftq_bits={bits}: the base is stored in {said} bits; leave it out")
    weights = FloatWeights(model, purpose)
    if missing := [path for path, _, _ in chosen if weights.name_of(path) is None]:
        problems.add(f"{purpose}: {weights.name} does not hold the weights of {shortened(missing)}")
    problems.raise_as(ConfigError)
    with torch.no_grad():
        for path, view, adapter in chosen:
            adapter.approximate(weights.read(path, view) - view.weight().float())


BEGINNINGS: dict[str, Callable[[Any, Any, Built], None]] = {"loftq": loftq}


def begin(model: Any, config: Any, built: Built) -> None:
    """Fill adapters that were just made as `init_lora_weights` says, where it needs more than the layer."""
    name = getattr(config, "init_lora_weights", None)
    if isinstance(name, str) and name in BEGINNINGS and not any(adapter.device.type == "meta" for _, _, adapter in built):
        BEGINNINGS[name](model, config, built)
