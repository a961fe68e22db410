"""Activation offload: what backward needs of the blocks waits in the host's memory while the rest of the model is computed.

On a CUDA device tensors are copied on a stream of their own into pinned memory, so that copying goes on beside computing,
and come back on that stream, each while the one before it is in use. Weights, small tensors and what is not on the device
stay where they are. The loss inside the output head is left alone: its tensors are gone before the pass is over.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from weakref import ref

import torch
from torch import nn

from afina.errors import ConfigError
from afina.memory.keeping import Mover

__all__ = ["activation_mover", "check_offload"]

_SMALLEST = 1 << 20  # bytes; less is not worth a copy
_LEAVING = 3  # tensors that may be on their way out at once; the device keeps them until they are out


def check_offload(device: torch.device, option: str = "memory.activation_offload") -> None:
    """Raise ConfigError, naming the `option` as typed, on a device whose memory is the host's."""
    if device.type == "cpu":
        raise ConfigError(
            f"{option}: this run computes on the CPU, whose activations lie in the host's memory already, so that it would "
            "change nothing; leave it out. memory.gradient_checkpointing=true takes less memory anywhere"
        )


def activation_mover(device: torch.device, option: str = "memory.activation_offload") -> Mover:
    """Who takes what is kept for backward from `device` to the host; for `keep_less`. Raises as `check_offload` does."""
    check_offload(device, option)
    return _Mover(device)


class _Away:
    """A tensor in the host's memory, the one that left before it, and itself on the device again once it is on its way."""

    def __init__(self, host: torch.Tensor, before: _Away | None, out: Any):
        self.host, self.out = host, out
        self.before = ref(before) if before is not None else lambda: None
        self.back: torch.Tensor | None = None


class _Mover:
    """Copies saved tensors of one device out and in."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.weights: set[int] = set()
        self.leaving: list[tuple[torch.Tensor, Any]] = []
        self.last: ref[_Away] | None = None

    def begin(self, model: nn.Module) -> None:
        """Note where the weights lie, which may have moved."""
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.device.type == self.device.type}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Away:
        """What is kept in the place of a tensor."""
        tensor = tensor.detach()
        plain = type(tensor) is torch.Tensor and tensor.device.type == self.device.type
        if not plain or tensor.nbytes < _SMALLEST or tensor.untyped_storage().data_ptr() in self.weights:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None)
        out = None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._beside():
            host.copy_(tensor, non_blocking=self.stream is not None)
            if self.stream is not None:
                out = self.stream.record_event()
                self.leaving.append((tensor, out))  # its memory must not be used again before the copy is done
        while len(self.leaving) > _LEAVING:
            torch.cuda.current_stream(self.device).wait_event(self.leaving.pop(0)[1])
        away = _Away(host, self.last() if self.last is not None else None, out)
        self.last = ref(away)
        return away

    def unpack(self, kept: torch.Tensor | _Away) -> torch.Tensor:
        """The tensor again."""
        if isinstance(kept, torch.Tensor):
            return kept
        back = self._on_its_way(kept)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            back.record_stream(torch.cuda.current_stream(self.device))
            self.leaving.clear()
        kept.back = None
        if (before := kept.before()) is not None:  # backward asks for it next
            before.back = self._on_its_way(before)
        return back

    def _on_its_way(self, away: _Away) -> torch.Tensor:
        if away.back is not None:
            return away.back
        with self._beside():
            if away.out is not None:
                self.stream.wait_event(away.out)
            return away.host.to(self.device, copy=True, non_blocking=self.stream is not None)

    def _beside(self) -> Any:
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()
