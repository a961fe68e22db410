"""One process, or several with a whole model each that exchange gradients (DistributedDataParallel), through Accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from afina.training.engines.engine import Ask, Engine, Optimizers, Work

__all__ = ["DDP"]


class DDP(Engine):
    """A whole model in each process."""

    name = "ddp"

    @property
    def recovers(self) -> bool:
        return self.processes == 1

    def _build(self, model: Any, optimizers: Optimizers, idle: bool) -> None:
        # without find_unused_parameters processes would wait for ever for gradients that do not come
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=idle)
        self.wrapped, self.optimizer = self.accelerator.prepare(Work(model), optimizers(self.trained))

    def _wrong(self) -> str:
        if (self.processes > 1) != isinstance(self.wrapped, DistributedDataParallel):
            return f"the model was wrapped as a {type(self.wrapped).__name__}"
        return ""

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    def loss(self, ask: Ask, batch: Any, *, last: bool) -> torch.Tensor:
        together = nullcontext() if last else self.accelerator.no_sync(self.wrapped)
        with together, self.autocast():
            return self.wrapped(ask, batch)  # type: ignore[no-any-return]

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss * self.processes)  # processes average their gradients

    def step(self, max_norm: float) -> float:
        norm = self._clip(max_norm)
        self.optimizer.step()
        self.forget()
        return float(norm)

    def _clip(self, max_norm: float) -> torch.Tensor:
        """Cut the gradients to the norm; on a CPU, where it costs nothing to look, they are left as they are if there is
        nothing to cut, which spares a pass over them."""
        if self.device.type != "cpu" or self.accelerator.scaler is not None:
            return self.accelerator.clip_grad_norm_(self.trained.values(), max_norm)  # type: ignore[no-any-return]
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not norm + 1e-6 <= max_norm:  # also where it is not finite
            nn.utils.clip_grads_with_norm_(self.trained.values(), max_norm, norm)
        return norm

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _gathered(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    def optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        if self.accelerator.scaler is not None:
            state = {**state, "scaler": self.accelerator.scaler.state_dict()}
        return state  # type: ignore[no-any-return]

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict({key: value for key, value in state.items() if key != "scaler"})
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
