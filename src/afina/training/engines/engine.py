"""What the loop knows of devices and processes: `Engine`.

A step goes `loss` and `backward` for each part, then `step`. What a task does with the model happens inside one module,
`Work`, which is what an engine wraps: a task may call the model twice or read its head, and every shard of it is whole
meanwhile. Checkpoints know nothing of engines: `weights` and `optimizer_state` are whole tensors, in torch's own form, so
that a run goes on under another engine or with another number of processes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import nn

from afina.errors import TrainingError

__all__ = ["Engine", "Work"]

Ask = Callable[[Any, Any], Any]  # what is done with the model and a batch
Optimizers = Callable[[Mapping[str, torch.Tensor]], torch.optim.Optimizer]
_FOREIGN = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron"}


class Work(nn.Module):
    """A model together with whatever is asked of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ask: Ask, batch: Any) -> Any:
        """What `ask` makes of the model and the batch."""
        return ask(self.model, batch)


class Engine(ABC):
    """How the processes of a run share its work. Before `prepare` it reads with the bare model, in this process alone.

    `precision` is that of the arithmetic: fp32, bf16 or fp16. Raises TrainingError where processes were started that do
    not see each other (T44).
    """

    name: ClassVar[str]
    sharded: ClassVar[bool] = False  # every process must take part in every pass through the model
    optimizers: ClassVar[tuple[str, ...] | None] = None  # those that it can divide; None: all

    def __init__(self, precision: str, *, offload: bool = False):
        _refuse_other_configurations()
        AcceleratorState._reset_state()  # precision is kept per process otherwise, and a second run could not have another
        alone = not torch.accelerator.is_available()  # else accelerate overlooks the processes that torchrun started
        self.accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=alone)
        self.precision, self.offload = precision, offload
        self.model: Any = None  # bare, once prepared
        self.trained: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.size = 0  # bytes of all parameters
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.processes != started:
            raise TrainingError(
                f"{started} processes were started, but each would train alone (accelerate sees {self.processes}); "
                "start with `afina train --processes` or torchrun"
            )

    @property
    def recovers(self) -> bool:
        """Whether a step that ran out of memory can be begun again."""
        return False

    # --- where

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def processes(self) -> int:
        """How many there are."""
        return int(self.accelerator.num_processes)

    @property
    def process(self) -> int:
        """Which this is, from 0."""
        return int(self.accelerator.process_index)

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.process == 0

    def place(self, model: nn.Module) -> None:
        """Put a model where it is read before it is prepared."""
        model.to(self.device)

    # --- together

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the run."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def total(self, value: torch.Tensor | float) -> torch.Tensor:
        """The sum of a number over all processes."""
        made = value if isinstance(value, torch.Tensor) else torch.tensor(value, device=self.device)
        return self.accelerator.reduce(made, reduction="sum")  # type: ignore[no-any-return]

    def gather(self, value: Any) -> list[Any]:
        """A value of every process, in their order."""
        return gather_object([value]) if self.processes > 1 else [value]

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

    # --- a step

    def prepare(self, model: Any, optimizers: Optimizers, *, idle: bool = False) -> None:
        """Take over a model and divide it; `optimizers` makes an optimizer of trained weights by their names.

        `idle`: some trained weights get no gradient. Raises TrainingError where what was built is not what was asked (T44).
        """
        self.model = model
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self.trained.items()}
        self.size = sum(p.numel() * p.element_size() for p in model.parameters())
        self._build(model, optimizers, idle)
        problem = self._wrong()
        if problem:
            raise TrainingError(f"distributed.engine={self.name} was asked for {self.processes} processes, but {problem}")

    @abstractmethod
    def _build(self, model: Any, optimizers: Optimizers, idle: bool) -> None:
        """Wrap the model and make the optimizer."""

    @abstractmethod
    def _wrong(self) -> str:
        """What was built otherwise than asked; empty where nothing was."""

    @property
    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose learning rates are set."""

    @abstractmethod
    def loss(self, ask: Ask, batch: Any, *, last: bool) -> torch.Tensor:
        """The loss of one part of a step, in the arithmetic of the run; gradients are exchanged with the `last` alone."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a part; over the processes they are summed."""

    @abstractmethod
    def step(self, max_norm: float) -> float:
        """Cut the gradients to `max_norm`, move the weights, forget the gradients; returns the norm from before."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the gradients of a step that is not made."""

    def read(self, model: Any, ask: Ask, batch: Any) -> Any:
        """What `ask` makes of the model and a batch, where nothing is learned."""
        return ask(model, batch)

    # --- what is kept

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of the trained weights, whole and on the CPU, in every process. All processes must ask.

        Raises TrainingError where a weight does not have the size that it had before it was divided (T36).
        """
        made = self._gathered()
        wrong = [f"{n} is {list(made[n].shape)}, expected {list(s)}" for n, s in self.shapes.items() if made[n].shape != s]
        if wrong or made.keys() != self.shapes.keys():
            raise TrainingError(f"{self.name}: trained weights did not come back whole: {'; '.join(wrong[:3])}")
        return made

    @abstractmethod
    def _gathered(self) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put whole weights into the model."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state in torch's form, whole and on the CPU. All processes must ask."""

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""

    def saved(self) -> list[Any]:
        """Parameters that saving looks at: the trained, and the embeddings, which are saved where they were enlarged."""
        tables = [self.model.get_output_embeddings()]
        with suppress(NotImplementedError):  # models that read no tokens
            tables.append(self.model.get_input_embeddings())
        found = {id(p): p for p in self.trained.values()}
        return list((found | {id(p): p for table in tables if table is not None for p in table.parameters()}).values())

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The `saved` parameters are whole inside the block. All processes must enter."""
        yield

    # --- what was built

    def held(self) -> int:
        """Bytes of the parameters that this process holds."""
        return self.size

    def built(self) -> dict[str, Any]:
        """What was built, for metrics.json."""
        held = {"weights_bytes": self.size, "weights_bytes_of_a_process": self.held()}
        return {"engine": self.name, "processes": self.processes, **held}

    def close(self) -> None:  # noqa: B027 (most make nothing)
        """Let go of what the engine made around the model."""


def _refuse_other_configurations() -> None:
    found = [name for key, name in _FOREIGN.items() if os.environ.get(key, "false").lower() in ("1", "true", "yes")]
    if found:
        raise TrainingError(
            f"accelerate was started with a configuration for {' and '.join(found)}; the engine is part of the recipe. "
            "Start without it and set distributed.engine (--engine): ddp, fsdp2, zero2 or zero3"
        )
