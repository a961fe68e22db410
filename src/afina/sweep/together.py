"""Several runs trained in one pass a step: `train_together`.

Each run is executed as it would be alone, by the same code, in a `Turn` of its own; only where it asks for the loss of a
step and for its gradients it waits for others, whose rows then go through the base together. Data order, schedule,
optimizer, evaluations, checkpoints and the end of a run stay its own, so that runs may have different numbers of steps. A
run whose batch is much wider than the others' goes later: a joined batch is padded to its widest row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from afina.errors import StoppedError
from afina.memory.measure import is_out_of_memory, release
from afina.sweep.joined import Asked, JoinedModel, width_of
from afina.sweep.turns import Turn
from afina.training.engines.ddp import DDP
from afina.training.fast_path import fast_path
from afina.training.running import Run
from afina.training.signals import Signals

__all__ = ["Waiting", "train_together"]

_PADDED = 1.1  # tokens of a joined batch for one of its own

Over = Callable[[str, Any], None]  # the name of a run and its metrics, or the error that it ended with


class Waiting(DDP):
    """The engine of a run that is one of several: it computes no loss by itself.

    The loss that the run gets is a leaf, so that what the run divides it by is all that is between it and the gradients.
    """

    def __init__(self, precision: str, model: Any, count: int):
        super().__init__(precision)
        self.bare, self.count = model, count
        self.turn: Turn
        self.leaf: torch.Tensor | None = None

    def loss(self, ask: Any, batch: Any, *, last: bool) -> torch.Tensor:
        self.leaf = self.turn.ask(Asked(self.bare, ask, batch)).detach().requires_grad_()
        return self.leaf

    def backward(self, loss: torch.Tensor) -> None:
        assert self.leaf is not None
        self.turn.ask(torch.autograd.grad(loss, self.leaf)[0])

    def built(self) -> dict[str, Any]:
        """With how many runs there were in a pass."""
        return {**super().built(), "together": self.count}


def train_together(
    runs: Mapping[str, Run],
    joined: JoinedModel,
    most: int,
    over: Over,
    tell: Callable[[str, dict[str, Any]], None] = lambda name, line: None,
) -> list[str]:
    """Execute the runs, at most `most` of them in one pass; `over` is called with each as it ends.

    Returns what happened on the way, as sentences. Raises StoppedError once all have stopped where Ctrl-C or SIGTERM came.
    """
    engines = {name: Waiting(run.precision, run.model, len(runs)) for name, run in runs.items()}
    for name, run in runs.items():
        engines[name].turn = Turn(partial(run.execute, partial(tell, name), engines[name]))
    turns = {name: engine.turn for name, engine in engines.items()}
    steps, notes = dict.fromkeys(runs, 0), list[str]()
    first, engine = next(iter(runs.values())), next(iter(engines.values()))

    def go_on(name: str, answer: Any = None, error: BaseException | None = None) -> None:
        turns[name].resume(answer, error=error)
        if turns[name].over:
            turn = turns.pop(name)
            over(name, turn.error if turn.error is not None else turn.result)

    def too_little(error: RuntimeError, tried: int) -> int:
        """How many to try next; raises what is no lack of memory."""
        if not is_out_of_memory(error) or tried == 1:
            raise error
        release(engine.device)
        notes.append(f"memory ran out with {tried} runs in a pass; from there on a pass had at most {tried // 2}")
        return tried // 2

    with Signals() as signals, ExitStack() as used:
        used.callback(_end, turns)  # those that an error here has left waiting
        for name in list(turns):
            go_on(name)
        if turns:
            spare = not first.recipe.memory.tight
            options = first.recipe.training
            used.enter_context(fast_path(joined.model, first.task, first.rows, options, engine, spare=spare))
        while turns:
            if signals.seen:
                for name in list(turns):
                    go_on(name, error=StoppedError("stopped with the sweep", signals.seen))
                raise StoppedError("the sweep was stopped", signals.seen)
            asked: dict[str, Asked] = {name: turn.asked for name, turn in turns.items()}
            asked = {name: asked[name] for name in _chosen(asked, steps, most)}
            joined.model.train()
            try:
                with engine.autocast():
                    losses = joined.losses(asked)
            except RuntimeError as error:
                if is_out_of_memory(error) and len(asked) == 1:  # the run computes its step in more parts
                    go_on(next(iter(asked)), error=error)
                else:
                    most = too_little(error, len(asked))
                continue
            for name, loss in zip(asked, losses, strict=True):
                go_on(name, loss)
            scales = [turns[name].asked for name in asked]
            begun = any(p.grad is not None for name in asked for p in engines[name].trained.values())
            try:
                torch.autograd.backward(losses, scales)
            except RuntimeError as error:
                del losses
                if begun or len(asked) == 1:
                    if not is_out_of_memory(error):
                        raise
                    for name in asked:
                        go_on(name, error=error)
                    continue
                most = too_little(error, len(asked))
                for name in asked:
                    engines[name].forget()
                for i in range(0, len(asked), most):
                    some = dict(list(asked.items())[i : i + most])
                    with engine.autocast():
                        losses = joined.losses(some)
                    torch.autograd.backward(losses, scales[i : i + most])
            for name in asked:
                steps[name] += 1
                go_on(name)
    return notes


def _end(turns: Mapping[str, Turn]) -> None:
    for turn in turns.values():
        turn.end()


def _chosen(asked: Mapping[str, Asked], steps: Mapping[str, int], most: int) -> list[str]:
    """The run that is furthest behind, and those whose batches are nearly as wide."""
    behind = min(asked, key=lambda name: steps[name])
    width = {name: width_of(one.batch) for name, one in asked.items()}
    rows = {name: len(one.batch["input_ids"]) for name, one in asked.items()}
    found = [behind]
    for name in sorted(asked, key=lambda name: (abs(width[name] - width[behind]), steps[name])):
        more = [*found, name]
        padded = max(width[n] for n in more) * sum(rows[n] for n in more)
        if name != behind and len(found) < most and padded <= _PADDED * sum(width[n] * rows[n] for n in more):
            found = more
    return found
