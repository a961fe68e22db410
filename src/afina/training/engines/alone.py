"""A group of one: what divides work among processes, where there is a single one.

It saves no memory in shards, but offloading does, and the same recipe runs on a laptop and on a cluster.
"""

from __future__ import annotations

import atexit

import torch
import torch.distributed as dist

__all__ = ["group_of_one"]


def group_of_one(device: torch.device) -> None:
    """Make a process group of this process alone where there is no group yet."""
    if dist.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
