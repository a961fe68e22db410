"""How the frozen weights of a base are stored, and loading them straight into that storage."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from afina.errors import ConfigError
from afina.memory.loading import check_library, load_quantised
from afina.memory.outlines import outlined, untied
from afina.memory.packed import PACKED, load_packed

__all__ = ["FLOATS", "QUANTISED", "STORAGES", "Storage", "settled_weights", "stored_as"]

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = ("int8", "nf4", "fp4", "int8_weight_only")  # what a checkpoint can be quantised to as it is loaded
STORAGES = (*FLOATS, *QUANTISED, *PACKED)


@dataclass(frozen=True)
class Storage:
    """`weights` is one of STORAGES; `empty` builds the model on the meta device from its configuration alone.

    `floats` (one of FLOATS) is the type of what stays in floating point where weights are quantised; `Storage.of` finds it.
    """

    weights: str = "fp32"
    empty: bool = False
    floats: str = "fp32"

    @classmethod
    def of(cls, weights: str, config: Any, *, empty: bool = False) -> Storage:
        """The storage for a checkpoint of this configuration: what is not quantised keeps the checkpoint's type, so that
        nothing grows (T33), but for float16 on a CPU, which cannot compute it (T45) and takes bfloat16."""
        own = next((name for name, dtype in FLOATS.items() if dtype == getattr(config, "dtype", None)), "fp32")
        return cls(weights, empty, "bf16" if own == "fp16" and not torch.accelerator.is_available() else own)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantised, and of activations where nothing else is said."""
        return FLOATS.get(self.weights, FLOATS[self.floats])

    def arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        """The most exact arithmetic that the stored weights allow: float32, or autocast to the 16-bit type they have."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def load(self, auto: Any, path: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
        """A model of one of transformers' Auto classes, and what loading found (missing_keys, mismatched_keys).

        `settings` go into the configuration.
        """
        if self.empty:
            from transformers import AutoConfig

            with torch.device("meta"):
                model = auto.from_config(AutoConfig.from_pretrained(path, **settings), dtype=self.dtype)
            untied(model, path)
            if self.weights not in FLOATS:
                outlined(model, self.weights)
            return model, {"missing_keys": [], "mismatched_keys": []}
        if self.weights in PACKED:
            return load_packed(auto, path, self.weights, self.dtype, **settings)
        if self.weights in QUANTISED:
            return load_quantised(auto, path, self.weights, self.dtype, **settings)
        return auto.from_pretrained(  # type: ignore[no-any-return]
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for other labels is replaced; anything else is refused by the caller
            dtype=self.dtype,
            **settings,
        )


def stored_as(config: Any) -> str | None:
    """How a checkpoint that was quantised before stores its weights, by its configuration; None for floating point.

    Raises ConfigError for a storage that afina does not know.
    """
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    said = said if isinstance(said, dict) else said.to_dict()
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method"))).lower()
    if method in PACKED:
        return method
    if method == "bitsandbytes":
        return str(said.get("bnb_4bit_quant_type", "fp4")) if said.get("load_in_4bit") else "int8"
    if method == "torchao" and "int8weightonly" in str(said.get("quant_type")).lower().replace("_", ""):
        return "int8_weight_only"
    raise ConfigError(
        f"the checkpoint is quantised by {method}, which afina does not train on; it knows bitsandbytes, torchao's int8 "
        f"weight-only, {', '.join(PACKED)}. Take the checkpoint in 16 bits, and memory.weights=nf4 or int8"
    )


def settled_weights(asked: str, config: Any, precision: str) -> str:
    """The storage of the frozen weights: what was asked for, or for `auto` the checkpoint's own where it is quantised, or
    16-bit as the arithmetic is. Raises ConfigError where the checkpoint contradicts, MissingDependencyError where the
    library is not installed."""
    there = stored_as(config)
    if there is not None and asked not in ("auto", there):
        raise ConfigError(
            f"memory.weights={asked}: the checkpoint is stored as {there}, and what was quantised once is not quantised "
            f"again. Leave memory.weights out to train on it as it is, or take the checkpoint in 16 bits"
        )
    if there is None and asked in PACKED:
        raise ConfigError(
            f"memory.weights={asked}: the checkpoint is not quantised so, and {asked} needs data to quantise by; take a "
            f"checkpoint in {asked}, or memory.weights=nf4 or int8, which need none"
        )
    own = next((name for name, dtype in FLOATS.items() if dtype == config.dtype), "fp32")
    weights = there or (asked if asked != "auto" else own if own == precision else "fp32")
    check_library(weights)
    return weights
