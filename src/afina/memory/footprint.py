"""What a run holds at its three moments, part by part: while it loads, in a training step, while it evaluates.

Several processes may divide parts among them, and parts may lie in the host's memory: `divided` says which, by engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TITLES", "Footprint", "Moment", "divided", "titled"]

TITLES = {
    "process": "Python and its libraries",
    "ready": "frozen weights as they are computed with",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "copies": "best weights so far, and those before",
    "exchange": "buffers for the exchange of gradients",
    "gathered": "weights gathered from the shards",
    "activations": "activations kept for backward",
    "logits": "logits and loss",
    "workspace": "workspace",
    "allocator": "freed, but held by the allocator",
}
_SHARDED = {"ddp": (), "zero2": ("optimizer", "gradients"), "zero3": ("weights", "optimizer", "gradients", "adapters")}
_SHARDED["fsdp2"] = _SHARDED["zero3"]
_TO_HOST = {"zero2": ("optimizer", "gradients"), "zero3": ("weights", "optimizer", "gradients", "adapters")}


def titled(part: str) -> str:
    """A part as a person calls it: `weights int8` stays as it is."""
    return TITLES.get(part, part)


@dataclass
class Moment:
    """Bytes by part, on the device and in the host's memory; on a CPU everything is on the device."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)


@dataclass
class Footprint:
    """What a run takes: its moments by name (load, train, evaluate), and what was taken for granted, as sentences."""

    device: str
    moments: dict[str, Moment]
    notes: list[str] = field(default_factory=list)
    disk: str = ""  # what lies there and so not in memory

    @property
    def decisive(self) -> str:
        """The moment that takes most of the device."""
        return max(self.moments, key=lambda name: sum(self.moments[name].device.values()))

    @property
    def total(self) -> int:
        """Bytes of the device at the moment that takes most."""
        return sum(self.moments[self.decisive].device.values())

    @property
    def host(self) -> int:
        """Bytes of the host's memory, apart from the device, at the moment that takes most."""
        return max(sum(moment.host.values()) for moment in self.moments.values())

    @property
    def largest(self) -> str:
        """The part that takes most of the device at that moment."""
        parts = self.moments[self.decisive].device
        return max(parts, key=parts.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        moments = {name: {"device": dict(m.device), "host": dict(m.host)} for name, m in self.moments.items()}
        return {"device": self.device, "bytes": self.total, "host_bytes": self.host, "decisive": self.decisive,
                "moments": moments, "notes": list(self.notes), "disk": self.disk}  # fmt: skip


def divided(
    parts: Mapping[str, int], engine: str, processes: int, *, offload: bool, gathered: int
) -> tuple[dict[str, int], dict[str, int]]:
    """The parts of one process, on its device and in its host's memory.

    ddp has buffers for gradients, as large as what is trained. `gathered` is how many bytes of frozen weights are whole at
    once where they lie in shards.
    """
    device, host = dict(parts), dict[str, int]()
    if engine == "ddp":
        if processes > 1 and "adapters" in parts:
            device["exchange"] = parts["adapters"]
        return device, host
    for part in parts:
        kind = part.split(" ")[0]
        if kind in _SHARDED[engine]:
            device[part] = -(-parts[part] // processes)
        if offload and kind in _TO_HOST[engine]:
            host[part] = device.pop(part)
    if "weights" in _SHARDED[engine]:
        device["gathered"] = gathered
    return device, host
