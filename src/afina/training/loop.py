"""The training loop, to be read from top to bottom: `fit`.

A step divides the summed loss by all targets of the step, over its parts and over all processes, so that neither
accumulation nor more processes change it (T25). The loop stops with an error where the loss is not a number and where the
adapter does not move (T10). Validation chooses the epoch whose weights are kept.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from afina.core.adapter import SavedModule
from afina.errors import TrainingError
from afina.training import checkpoints
from afina.training.batching import parts, shuffled_batches, sorted_batches
from afina.training.recipe import TrainingOptions

__all__ = ["Fitted", "Rows", "fit", "make_accelerator", "predict"]

_PATIENCE = 3  # steps after which some adapter weight must have changed


@dataclass
class Rows:
    """Token ids and class numbers of one side of the split."""

    ids: list[list[int]]
    targets: list[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.ids]


@dataclass
class Fitted:
    """What training took and found."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    best_epoch: int = 0
    validation: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int = 0


def make_accelerator(precision: str) -> Accelerator:
    """The devices and processes there are; raises TrainingError where processes were started and are not seen (T44)."""
    AcceleratorState._reset_state()  # precision is kept per process otherwise, and a second run could not have another
    alone = not torch.accelerator.is_available()  # else accelerate overlooks the processes that torchrun started
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=alone)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise TrainingError(
            f"{started} processes were started, but each would train alone (accelerate sees {accelerator.num_processes}); "
            "start with torchrun, and without a DeepSpeed or FSDP configuration for the CPU"
        )
    return accelerator


def fit(
    model: Any,
    task: Any,
    train: Rows,
    validation: Rows,
    options: TrainingOptions,
    accelerator: Accelerator,
    folder: Path,
    *,
    tell: Callable[[dict[str, Any]], None] = lambda line: None,
    resume: bool = False,
) -> Fitted:
    """Train the adapter of `model`; at the end it holds the weights of the best epoch.

    `tell` gets every line that goes to `log.jsonl` in `folder`. `resume` goes on from the last checkpoint there.
    """
    started, result = time.perf_counter(), Fitted()
    assert options.learning_rate is not None  # Recipe.check resolves it
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(_groups(trained, options.weight_decay), lr=options.learning_rate, betas=(0.9, 0.999))
    steps_per_epoch = math.ceil(len(train.ids) / options.batch_size)
    total_steps = steps_per_epoch * options.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_schedule(total_steps, options.warmup))
    best: dict[str, torch.Tensor] = {}
    best_score, first_epoch = (-math.inf, -math.inf), 1
    last = checkpoints.latest(folder / "checkpoints") if resume else None
    if resume and last is None:
        raise TrainingError(f"--resume: {folder} has no checkpoint to go on from; leave --resume out")
    if last is not None:
        state, best = checkpoints.load(last, trained, optimizer, scheduler)
        best_score, first_epoch = tuple(state["best_score"]), state["epoch"] + 1
        result = Fitted(**state["fitted"])
        started -= result.seconds
    watched = _adapter_parameters(model)
    before = {name: p.detach().clone() for name, p in watched.items()}
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    with Log(folder / "log.jsonl", accelerator.is_main_process, tell, keep=result.steps if resume else 0) as log:
        for epoch in range(first_epoch, options.epochs + 1):
            model.train()
            epoch_loss = epoch_targets = 0.0
            for rows in shuffled_batches(train.lengths, options.batch_size, seed=options.seed, epoch=epoch):
                batches = list(_parts_of_step(task, train, rows, options.gradient_accumulation, accelerator))
                targets = sum(task.targets_in(batch) for counts, batch in batches if counts)
                targets = int(accelerator.reduce(torch.tensor(float(targets), device=accelerator.device)))
                loss = torch.zeros((), device=accelerator.device)
                for counts, batch in batches:
                    with _together(accelerator, wrapped, last=batch is batches[-1][1]), accelerator.autocast():
                        part = task.loss_sum(wrapped, batch) / targets * (1 if counts else 0)
                    accelerator.backward(part * accelerator.num_processes)  # processes average their gradients
                    loss += part.detach()
                    result.tokens += int(batch["attention_mask"].sum()) if counts else 0
                loss = accelerator.reduce(loss)
                norm = accelerator.clip_grad_norm_(trained.values(), options.max_grad_norm)
                rate = float(scheduler.get_last_lr()[0])
                _stop_unless_finite(float(loss), result.steps + 1, epoch, rate, options)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                scheduler.step()
                result.steps += 1
                epoch_loss, epoch_targets = epoch_loss + float(loss) * targets, epoch_targets + targets
                log(epoch=epoch, step=result.steps, of=total_steps, loss=float(loss), gradient_norm=float(norm),
                    learning_rate=rate, targets=targets)  # fmt: skip
                if result.steps == min(_PATIENCE, total_steps):
                    _stop_unless_moved(watched, before)

            probabilities = predict(model, task, validation.ids, options.batch_size * 2, accelerator)
            figures = task.metrics(probabilities, validation.targets)
            score = (-figures["loss"] if options.best == "loss" else figures[options.best], -figures["loss"])
            improved = score > best_score
            if improved:
                best_score, result.best_epoch, result.validation = score, epoch, figures
                best = {name: p.detach().cpu().clone() for name, p in trained.items()}
            result.seconds = time.perf_counter() - started
            chosen = {f"validation_{key}": figures[key] for key in ("loss", "accuracy", "macro_f1")}
            log(epoch=epoch, step=result.steps, train_loss=epoch_loss / epoch_targets, best=improved,
                seconds=round(result.seconds, 2), **chosen)  # fmt: skip
            if accelerator.is_main_process:
                live = {name: p.detach() for name, p in trained.items()}
                state = {"best_score": best_score, "fitted": vars(result)}
                checkpoints.save(folder / "checkpoints", epoch, live, best, state, optimizer, scheduler)
            accelerator.wait_for_everyone()

    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best[name])
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    result.peak_memory_bytes = _peak_memory(accelerator.device)
    return result


@torch.no_grad()
def predict(
    model: Any, task: Any, ids: Sequence[Sequence[int]], batch_size: int, accelerator: Accelerator, *, exact: bool = False
) -> np.ndarray:
    """Probabilities `[rows, classes]` in the order of the rows; nothing else is kept from batch to batch (T32).

    `exact` computes in float32 even where training did not, so that figures are those of the saved adapter anywhere.
    """
    model.eval()
    answers = np.zeros((len(ids), len(task.labels)))
    for rows in sorted_batches([len(row) for row in ids], batch_size):
        batch = {k: v.to(accelerator.device) for k, v in task.collate([ids[i] for i in rows]).items()}
        with nullcontext() if exact else accelerator.autocast():
            logits = task.logits(model, batch)
        answers[rows] = torch.softmax(logits.double(), dim=-1).cpu().numpy()
    return answers


def linear_schedule(steps: int, warmup: float) -> Callable[[int], float]:
    """Factor of the learning rate: up over the first share of the steps, then down to almost nothing at the last."""
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return max(0.0, (steps - step) / max(1, steps - rising + 1))

    return factor


class Log:
    """`log.jsonl`, one line a call, in the main process alone; a resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, write: bool, tell: Callable[[dict[str, Any]], None], keep: int):
        self.tell, self.file = tell, None
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_text(encoding="utf-8").splitlines() if keep and path.is_file() else []
            kept = [line for line in old if json.loads(line)["step"] <= keep]
            self.file = path.open("w", encoding="utf-8")
            self.file.writelines(f"{line}\n" for line in kept)

    def __call__(self, **line: Any) -> None:
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            self.tell(line)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _groups(trained: Mapping[str, torch.Tensor], decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in trained.values() if p.dim() >= 2]
    vectors = [p for p in trained.values() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _parts_of_step(
    task: Any, data: Rows, rows: list[int], count: int, accelerator: Accelerator
) -> Iterator[tuple[bool, dict[str, torch.Tensor]]]:
    """Whether a part of the step counts, and its batch, for each part of this process.

    A process without rows of its own goes through the motions with a row that does not count, since all must meet in
    backward.
    """
    own = parts(rows, accelerator.num_processes)[accelerator.process_index]
    made = [part for part in parts(own, count) if part] or [[]]
    for part in made:
        batch = task.collate([data.ids[i] for i in part or rows[:1]], [data.targets[i] for i in part or rows[:1]])
        yield bool(part), {k: v.to(accelerator.device) for k, v in batch.items()}


def _together(accelerator: Accelerator, model: Any, *, last: bool) -> Any:
    """Gradients are exchanged with the last part of a step alone."""
    return nullcontext() if last else accelerator.no_sync(model)


def _adapter_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Trained parameters of the adapter itself; those of modules trained whole count where there are no others."""
    whole = {id(p) for m in model.modules() if isinstance(m, SavedModule) for p in m.parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p for name, p in trained.items() if id(p) not in whole} or trained


def _stop_unless_moved(watched: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    if all(torch.equal(p.detach(), before[name]) for name, p in watched.items()):
        raise TrainingError(
            f"none of the {len(watched)} adapter weights has changed in the first {_PATIENCE} steps, so the run would teach "
            f"the model nothing (for example {next(iter(watched), 'there are none')}). Is the adapter active, and does the "
            "output depend on the layers it adapts? See `afina targets`"
        )


def _stop_unless_finite(loss: float, step: int, epoch: int, rate: float, options: TrainingOptions) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {step} (epoch {epoch}, learning rate {rate:.2g}). Try a lower learning rate, for "
            f"example {(options.learning_rate or rate) / 10:.0e}"
            + ("" if options.precision == "fp32" else ", or precision fp32")
        )


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device where it counts them, else of the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
