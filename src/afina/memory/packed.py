"""Checkpoints that were quantised before: GPTQ, AWQ and HQQ."""

from __future__ import annotations

from typing import Any

import torch

from afina.errors import ConfigError

__all__ = ["PACKED", "load_packed"]

PACKED = ("gptq", "awq", "hqq")


def load_packed(auto: Any, path: str, weights: str, dtype: torch.dtype, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model of one of transformers' Auto classes with its linear layers as the checkpoint stores them."""
    raise ConfigError(f"memory.weights={weights} is not built yet")
