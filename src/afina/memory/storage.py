"""How the frozen weights of a base are stored, and loading them straight into that storage."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from afina.errors import ConfigError

__all__ = ["FLOATS", "STORAGES", "Storage"]

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORAGES = (*FLOATS, "int8", "nf4", "fp4", "int8_weight_only")


@dataclass(frozen=True)
class Storage:
    """`weights` is one of STORAGES; `empty` builds the model on the meta device from its configuration alone."""

    weights: str = "fp32"
    empty: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantised, and of activations where nothing else is said."""
        return FLOATS.get(self.weights, torch.float32)

    def arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        """The most exact arithmetic that the stored weights allow: float32, or autocast to the 16-bit type they have."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def load(self, auto: Any, path: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
        """A model of one of transformers' Auto classes, and what loading found (missing_keys, mismatched_keys).

        `settings` go into the configuration.
        """
        if self.weights not in FLOATS:
            raise ConfigError(f"memory.weights={self.weights} is not built yet")
        if self.empty:
            from transformers import AutoConfig

            with torch.device("meta"):
                model = auto.from_config(AutoConfig.from_pretrained(path, **settings), dtype=self.dtype)
            return model, {"missing_keys": [], "mismatched_keys": []}
        return auto.from_pretrained(  # type: ignore[no-any-return]
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for other labels is replaced; anything else is refused by the caller
            dtype=self.dtype,
            **settings,
        )
