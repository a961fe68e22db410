"""What a storage of weights is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

__all__ = ["WeightCodec"]


class WeightCodec(ABC):
    """One storage of weights."""

    name: str
    exact: bool = False  # reading after writing gives back the written values, up to the storage's dtype

    @abstractmethod
    def matches(self, layer: nn.Module) -> bool:
        """Whether `layer` keeps its weight in this storage."""

    @abstractmethod
    def read(self, layer: nn.Module) -> torch.Tensor:
        """The weight in floating point, shaped as the plain layer would hold it."""

    def prepare(self, layer: nn.Module) -> None:  # noqa: B027 (most storages need nothing)
        """Make a layer ready to be adapted; what it computes stays the same bit for bit."""

    def lean(self, layer: nn.Module) -> None:
        """Make a layer that was just loaded compute from what is stored without changing it, and keep no floating-point
        weight for backward."""
        self.prepare(layer)

    @abstractmethod
    def write(self, layer: nn.Module, weight: torch.Tensor) -> None:
        """Store `weight` (floating point, shaped as `read` returns it) in a new Parameter."""
