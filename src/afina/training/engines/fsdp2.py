"""Weights, gradients and optimizer in shards, one a process, by torch's `fully_shard` (FSDP2).

Each block of the model is whole only while it computes; what lies outside of the blocks, while the model does. Parameters
keep the type that they are stored in, frozen ones that of the checkpoint and trained ones float32, and are sent as such;
the 16-bit arithmetic is autocast's, as everywhere. A weight that several blocks share belongs to the whole model.
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from afina.core.adapter import Adapter
from afina.training.engines.alone import group_of_one
from afina.training.engines.engine import Ask, Engine, Optimizers, Work

__all__ = ["FSDP2", "blocks"]


class FSDP2(Engine):
    """A shard of every weight in each process."""

    name, sharded, optimizers = "fsdp2", True, ("adamw", "sgd")
    wrapped: Any = None

    def place(self, model: nn.Module) -> None:
        """Nothing: each block goes to its device on its own and leaves a shard there."""

    def _build(self, model: Any, optimizers: Optimizers, idle: bool) -> None:
        group_of_one(self.device)
        self.wrapped = Work(model)
        self.mesh: DeviceMesh = init_device_mesh(self.device.type, (self.processes,))
        found = blocks(model)
        uses = Counter(id(p) for block in found for p in {id(p): p for p in block.parameters()}.values())
        shared = {p for p in model.parameters() if uses[id(p)] > 1}
        for block in found:
            fully_shard(block, mesh=self.mesh, ignored_params=shared)
        fully_shard(self.wrapped, mesh=self.mesh)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizers(self.trained)

    def _wrong(self) -> str:
        whole = [name for name, p in self.model.named_parameters() if not isinstance(p, DTensor)]
        if whole:
            return f"{len(whole)} parameters were not divided, for example {whole[0]}"
        if self.mesh.size() != self.processes:
            return f"the weights were divided among {self.mesh.size()}"
        return ""

    def held(self) -> int:
        """Bytes of the shards of this process."""
        self._divide()
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())
        return sum(p.numel() * p.element_size() for p in local)

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def loss(self, ask: Ask, batch: Any, *, last: bool) -> torch.Tensor:
        self.wrapped.set_requires_gradient_sync(last)
        self.wrapped.set_is_last_backward(last)
        with self.autocast():
            return self.wrapped(ask, batch)  # type: ignore[no-any-return]

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.processes).backward()  # type: ignore[no-untyped-call]

    def step(self, max_norm: float) -> float:
        norm: Any = nn.utils.clip_grad_norm_(self.trained.values(), max_norm)
        self.optimizer.step()
        self.forget()
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def read(self, model: Any, ask: Ask, batch: Any) -> Any:
        return self.wrapped(ask, batch) if self.wrapped is not None else ask(model, batch)

    def _divide(self) -> None:
        """Put every weight back into its shards: after a pass without gradients the outer ones are still whole."""
        for module in self.wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _gathered(self) -> dict[str, torch.Tensor]:
        return {name: _whole(p) for name, p in self.trained.items()}

    @torch.no_grad()
    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._divide()
        for name, parameter in self.trained.items():
            parameter.copy_(self._shard(weights[name].to(parameter.dtype), parameter))

    def _shard(self, whole: torch.Tensor, like: Any) -> DTensor:
        """This process's part of a tensor that all have."""
        return distribute_tensor(whole.to(self.device), self.mesh, like.placements, src_data_rank=None)

    def optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        return {**state, "state": {i: {k: _whole(v) for k, v in of.items()} for i, of in state["state"].items()}}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.groups for p in group["params"]]
        divided = {
            i: {k: self._shard(v, parameters[i]) if _like(v, parameters[i]) else v for k, v in of.items()}
            for i, of in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": divided})

    @contextmanager
    def whole(self) -> Iterator[None]:
        self._divide()
        self.weights()  # which checks their sizes
        whole = {id(p): nn.Parameter(_whole(p), requires_grad=p.requires_grad) for p in self.saved()}
        kept = [
            (module, name, parameter)
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in whole
        ]
        for module, name, parameter in kept:
            module._parameters[name] = whole[id(parameter)]
        try:
            yield
        finally:
            for module, name, parameter in kept:
                module._parameters[name] = parameter


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost repeated parts of a model: the entries of its module lists, outside of adapters."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, Adapter):
            continue
        if isinstance(child, nn.ModuleList):
            found += [entry for entry in child if any(True for _ in entry.parameters())]
        else:
            found += blocks(child)
    return found


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _like(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == parameter.shape
