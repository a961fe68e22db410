"""ZeRO by DeepSpeed: optimizer and gradients in shards (stage 2) or the weights too (stage 3), on the host if asked.

DeepSpeed is called directly: through Accelerate it is silently something else on a CPU. The optimizer is torch's, so that
steps are those of every other engine and nothing is compiled first. The arithmetic is autocast's, as everywhere; weights
keep the type they are stored in.
https://arxiv.org/abs/1910.02054, https://arxiv.org/abs/2101.06840
"""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from afina.errors import MissingDependencyError
from afina.training.engines.alone import group_of_one
from afina.training.engines.engine import Ask, Engine, Optimizers, Work

__all__ = ["Zero2", "Zero3"]


class Zero2(Engine):
    """Optimizer and gradients in shards."""

    name, optimizers = "zero2", ("adamw", "sgd")
    stage = 2
    wrapped: Any = None

    def __init__(self, precision: str, *, offload: bool = False):
        deepspeed = _deepspeed()
        super().__init__(precision, offload=offload)
        self.unlaunched = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for a launcher's variable all the time
        group_of_one(self.device)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would be compiled first
        deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)

    def _build(self, model: Any, optimizers: Optimizers, idle: bool) -> None:
        made = optimizers(self.trained)
        self.order = [p for group in made.param_groups for p in group["params"]]
        self.template = copy.deepcopy(made.state_dict())
        self.wrapped, *_ = _deepspeed().initialize(
            model=Work(model), optimizer=made, config=self._config(), dist_init_required=False
        )

    def _config(self) -> dict[str, Any]:
        host = {"device": "cpu", "pin_memory": self.device.type != "cpu"}
        zero: dict[str, Any] = {"stage": self.stage, "overlap_comm": self.device.type != "cpu"}
        if self.offload:
            zero["offload_optimizer"] = host
        return {
            "train_micro_batch_size_per_gpu": 1,  # the loop makes the parts of a step
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,  # set anew in each step
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
        }

    def _wrong(self) -> str:
        stage = self.wrapped.zero_optimization_stage()
        if stage != self.stage:
            return f"DeepSpeed built stage {stage}"
        if self.wrapped.dp_world_size != self.processes:
            return f"DeepSpeed divides among {self.wrapped.dp_world_size}"
        if self.offload and not self._offloads():
            return "DeepSpeed offloads nothing"
        return ""

    def _offloads(self) -> bool:
        return bool(self.wrapped.optimizer.cpu_offload)

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.wrapped.optimizer.param_groups  # type: ignore[no-any-return]

    def loss(self, ask: Ask, batch: Any, *, last: bool) -> torch.Tensor:
        self.wrapped.set_gradient_accumulation_boundary(last)

        def asked(model: Any, batch: Any) -> Any:
            with self.autocast():  # DeepSpeed takes away the one from outside
                return ask(model, batch)

        return self.wrapped(asked, batch)  # type: ignore[no-any-return]

    def backward(self, loss: torch.Tensor) -> None:
        self.wrapped.backward(loss * self.processes)  # DeepSpeed averages gradients

    def step(self, max_norm: float) -> float:
        self.wrapped.optimizer.clip_grad = max_norm
        self.wrapped.step()
        norm = self.wrapped.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def forget(self) -> None:
        self.wrapped.optimizer.zero_grad(set_to_none=True)

    def read(self, model: Any, ask: Ask, batch: Any) -> Any:
        return ask(model, batch)

    def _gathered(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.trained.items()}

    @torch.no_grad()
    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    # --- the optimizer's state

    def optimizer_state(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.wrapped.optimizer.optimizer
        kept = [of for p in self._flat() if (of := inner.state.get(p))]
        state: dict[int, dict[str, Any]] = {}
        if kept:
            moments = [key for key, value in kept[0].items() if isinstance(value, torch.Tensor) and value.dim() > 0]
            numbers = {key: copy.deepcopy(value) for key, value in kept[0].items() if key not in moments}
            self._link()
            for i, parameter in enumerate(self.order):
                whole = {key: safe_get_full_optimizer_state(parameter, key).cpu().clone() for key in moments}
                state[i] = {**copy.deepcopy(numbers), **whole}
        return {**self.template, "state": state}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        known = [of for of in state["state"].values() if of]
        if not known:
            return
        inner = self.wrapped.optimizer.optimizer
        moments = [key for key, value in known[0].items() if isinstance(value, torch.Tensor) and value.dim() > 0]
        for flat in self._flat():
            numbers = {key: copy.deepcopy(value) for key, value in known[0].items() if key not in moments}
            inner.state[flat] = {**numbers, **{key: torch.zeros_like(flat) for key in moments}}
        self._link()
        for i, parameter in enumerate(self.order):
            for key in moments if i in state["state"] else ():
                self._set(parameter, state["state"][i][key].to(self.device), key)

    def _flat(self) -> list[Any]:
        """The parameters that the inner optimizer moves: one a group, cut for this process."""
        return list(self.wrapped.optimizer.single_partition_of_fp32_groups)

    def _link(self) -> None:
        """Let the weights know their state: DeepSpeed does so after the step of the first group, when others have none."""
        self.wrapped.optimizer._hp_optimizer_states_linked = False
        self.wrapped.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, value: torch.Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)

    def close(self) -> None:
        if self.wrapped is not None:
            self.wrapped.destroy()
            self.wrapped = None
        if self.unlaunched:  # which would make others look for a launcher's group
            os.environ.pop("LOCAL_RANK", None)


class Zero3(Zero2):
    """The weights in shards too."""

    name, sharded, stage = "zero3", True, 3

    def place(self, model: nn.Module) -> None:
        """Nothing: each weight goes to its device on its own and leaves a shard there."""

    def _config(self) -> dict[str, Any]:
        made = super()._config()
        zero = made["zero_optimization"]
        config = getattr(self.model, "config", None)
        width = getattr(config, "hidden_size", None) or 1024
        zero["stage3_param_persistence_threshold"] = 10 * width  # norms and biases are not worth sending each time
        zero["memory_efficient_linear"] = False  # would replace torch's own function for everybody
        if self.offload:
            zero["offload_param"] = zero["offload_optimizer"]
        return made

    def _wrong(self) -> str:
        whole = [name for name, p in self.model.named_parameters() if not hasattr(p, "ds_tensor")]
        if whole:
            return f"{len(whole)} parameters were not divided, for example {whole[0]}"
        return super()._wrong()

    def _offloads(self) -> bool:
        return bool(self.wrapped.optimizer.offload_optimizer and self.wrapped.optimizer.offload_param)

    def held(self) -> int:
        """Bytes of the shards of this process."""
        return sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in self.model.parameters())

    def read(self, model: Any, ask: Ask, batch: Any) -> Any:
        return self.wrapped(ask, batch) if self.wrapped is not None else ask(model, batch)

    def _gathered(self) -> dict[str, torch.Tensor]:
        made = {}
        for name, parameter in self.trained.items():
            with _gathered([parameter]):
                made[name] = parameter.detach().cpu().clone()
        return made

    @torch.no_grad()
    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.trained.items():
            with _gathered([parameter], modifier_rank=0):
                parameter.copy_(weights[name])

    @contextmanager
    def whole(self) -> Iterator[None]:
        self.weights()  # which checks their sizes
        with _gathered(self.saved()):
            yield

    def _flat(self) -> list[Any]:
        return list(self.wrapped.optimizer.fp32_partitioned_groups_flat)

    def _link(self) -> None:
        """Nothing: stage 3 looks the state up each time."""

    def _set(self, parameter: Any, value: torch.Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * self.processes - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, size * self.process, size), key)


def _gathered(parameters: list[Any], **options: Any) -> Any:
    """A context in which these parameters are whole; with `modifier_rank`, what that process puts into them stays."""
    return _deepspeed().zero.GatheredParameters(parameters, **options)


def _deepspeed() -> Any:
    """DeepSpeed, which talks to standard output while it is imported and after."""
    try:
        with redirect_stdout(io.StringIO()):
            import deepspeed
    except ImportError as error:
        raise MissingDependencyError("deepspeed", "deepspeed", "an engine of DeepSpeed (zero2, zero3)") from error
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:  # which speaks to standard output
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    return deepspeed
