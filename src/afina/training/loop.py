"""The training loop, to be read from top to bottom: `fit`.

A step divides the summed loss by all targets of the step, over its parts and over all processes, so that neither
accumulation nor more processes change it (T25). The loop stops with an error where the loss is not a number and where the
adapter does not move (T10). Validation chooses the weights that are kept. A run that is killed at any moment goes on from
its last checkpoint with the losses and weights it would have had (T3).
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from afina.core.adapter import SavedModule
from afina.errors import StoppedError, TrainingError
from afina.memory.measure import is_out_of_memory, release
from afina.tasks.task import Batch, Feature, Rows, Task
from afina.training import checkpoints
from afina.training.ahead import Ahead
from afina.training.batching import parts, shuffled_batches, sorted_batches, stretches
from afina.training.engines.choose import make_engine
from afina.training.engines.engine import Engine
from afina.training.log import Log
from afina.training.optimizers import make_optimizer, schedule_factor
from afina.training.recipe import TrainingOptions
from afina.training.referred import referred
from afina.training.signals import Signals

__all__ = ["Fitted", "fit", "make_engine", "predict"]

_READ_ON_A_CPU = 2048  # tokens of a batch where nothing is learned; more leave the CPU's caches
_PATIENCE = 3  # steps after which some adapter weight must have changed
_ROUNDED = 2**-23  # of a float32, by one product


@dataclass
class Fitted:
    """What training took and found."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    best_epoch: float = 0
    best_step: int = 0
    validation: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    notes: list[str] = field(default_factory=list)  # what happened on the way, as sentences for a person
    findings: list[str] = field(default_factory=list)  # what must be known by whoever reads the figures
    built: dict[str, Any] = field(default_factory=dict)  # engine, processes, bytes of the weights in all and in this one


def fit(
    model: Any,
    task: Task,
    train: Rows,
    validation: Rows,
    options: TrainingOptions,
    engine: Engine,
    folder: Path,
    *,
    tell: Callable[[dict[str, Any]], None] = lambda line: None,
    resume: bool = False,
    from_step: int | None = None,
) -> Fitted:
    """Train the adapter of `model`; at the end it holds the weights that validation liked best.

    `tell` gets every line that goes to `log.jsonl` in `folder`. `resume` goes on from the last checkpoint there, within an
    epoch too, or from that of `from_step`, and then later ones are removed. Raises StoppedError, with a checkpoint written,
    after the step in which Ctrl-C or SIGTERM came.
    """
    started, result = time.perf_counter(), Fitted()
    assert options.learning_rate is not None  # Recipe.check resolves it
    task.label_smoothing = options.label_smoothing
    best_by = options.best or next(iter(task.figures))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @lru_cache(2)
    def batches_of(epoch: int) -> list[list[int]]:
        return shuffled_batches(train.lengths, options.rows, seed=options.seed, epoch=epoch, tokens=options.batch_tokens)

    def rows_of(step: int) -> list[int]:
        epoch, position = divmod(step, steps_per_epoch)
        return batches_of(epoch + 1)[position // task.repeats]

    steps_per_epoch = len(batches_of(1)) * task.repeats  # of any other as well
    total_steps = steps_per_epoch * options.epochs
    between = max(1.0, options.evaluate_every * (steps_per_epoch if options.evaluate_unit == "epochs" else 1))
    best: dict[str, torch.Tensor] = {}
    best_score, waited, since_loss, since_targets = (-math.inf, -math.inf), 0, 0.0, 0.0
    places = folder / "checkpoints"
    last = checkpoints.chosen(places, from_step) if resume else None
    if resume and last is None:
        raise TrainingError(f"--resume: {folder} has no checkpoint to go on from; leave --resume out")
    saved: dict[str, Any] = {}
    same = {"training rows": _fingerprint(train), "batch_size": options.batch_size, "seed": options.seed,
            "optimizer": options.optimizer, "batch_tokens": options.batch_tokens}  # fmt: skip
    if last is not None:
        state, saved, best = checkpoints.load(last, trained)
        _stop_unless_same(state["same"], same, last)
        engine.wait()  # all have read before one removes
        if engine.main:
            checkpoints.forget_after(places, state["step"])
        best_score, waited, (since_loss, since_targets) = tuple(state["best_score"]), state["waited"], state["since"]
        result = Fitted(**state["fitted"])
        started -= result.seconds
    pieces = options.gradient_accumulation
    assert isinstance(pieces, int)  # `fewest_parts` has measured it
    watched, moved = _adapter_parameters(model), result.steps >= _PATIENCE
    idle = engine.processes > 1 and not engine.sharded and bool(_without_gradient(model, task, train, engine))

    def optimizers(named: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
        return make_optimizer(options.optimizer, named, float(options.learning_rate or 0), options.weight_decay)

    engine.prepare(model, optimizers, idle=idle)
    result.built = engine.built()
    before, decayed = engine.weights(), 1.0  # what weight decay alone has left of a weight
    if last is not None:
        engine.load_optimizer_state(saved["optimizer"])
        if engine.process < len(saved["chance"]):
            checkpoints.set_random_states(saved["chance"][engine.process])
        task.keep(saved.get("task", []))
    if task.refers:
        train = referred(model, task, train, options.read_at_once, engine, places, known=resume)

    def checkpoint() -> None:
        chance, live, moments = engine.gather(checkpoints.random_states()), engine.weights(), engine.optimizer_state()
        kept = engine.gather(task.kept())
        if engine.main:
            result.seconds = time.perf_counter() - started
            state = {"best_score": best_score, "waited": waited, "since": [since_loss, since_targets], "same": same,
                     "fitted": vars(result)}  # fmt: skip
            tensors = {"optimizer": moments, "chance": chance, "task": kept}
            checkpoints.save(places, result.steps, live, best, state, tensors, keep=options.keep_checkpoints,
                             best_step=result.best_step)  # fmt: skip
        engine.wait()

    with Log(folder / "log.jsonl", engine.main, tell, keep=result.steps if resume else None) as log, \
            Signals() as signals, Ahead(task, train.features, options.seed) as ahead:  # fmt: skip
        if last is None:
            checkpoint()  # so that a run that is killed early can go on as well
        while result.steps < total_steps and not (options.patience and waited >= options.patience):
            epoch, rows = result.steps // steps_per_epoch, rows_of(result.steps)
            for step in range(result.steps, min(result.steps + 2, total_steps)):
                ahead.begin(step, _of_process(rows_of(step), engine))
            model.train()
            chance = checkpoints.random_states()
            while True:
                try:
                    task.begin_step(result.steps + 1)
                    read = partial(ahead.take, result.steps)
                    loss, targets, tokens, noted = _gradients(task, read, rows, pieces, engine)
                    break
                except RuntimeError as error:
                    if not is_out_of_memory(error) or not engine.recovers or pieces >= len(rows):
                        raise _too_little_memory(error, options) from error
                engine.forget()
                release(engine.device)
                checkpoints.set_random_states(chance)
                pieces = min(2 * pieces, len(rows))
                note = f"memory ran out in step {result.steps + 1}; from there on steps are computed in {pieces} parts"
                result.notes.append(note)
            ahead.forget(result.steps)
            result.tokens += tokens
            factor = schedule_factor(options.schedule, total_steps, options.warmup, result.steps)
            rate = options.learning_rate * factor
            for group in engine.groups:
                group["lr"] = rate
            _stop_unless_finite(float(loss), result.steps + 1, epoch + 1, rate, options)
            norm = engine.step(options.max_grad_norm)
            result.steps += 1
            since_loss, since_targets = since_loss + float(loss) * targets, since_targets + targets
            log(epoch=epoch + 1, step=result.steps, of=total_steps, loss=float(loss), gradient_norm=norm,
                learning_rate=rate, targets=targets, tokens=result.tokens, **noted)  # fmt: skip
            decayed *= 1.0 - rate * options.weight_decay
            if not moved and (result.steps == total_steps or (result.steps >= _PATIENCE and not task.untaught)):
                _stop_unless_moved(watched, before, engine.weights(), decayed, result.steps, task.untaught)
                moved = True

            now = result.steps
            evaluated = now == total_steps or math.floor(now / between + 1e-9) > math.floor((now - 1) / between + 1e-9)
            if evaluated:
                answers = predict(model, task, validation, options.read_at_once, engine)
                figures = task.metrics(answers, validation.examples)
                reading = -math.inf if figures[best_by] is None else task.figures[best_by].better * figures[best_by]
                score = (reading, -figures["loss"])
                improved, reached = score > best_score, _epochs(now, steps_per_epoch)
                waited = 0 if improved else waited + 1
                if improved:
                    best_score, result.best_epoch, result.best_step, result.validation = score, reached, now, figures
                    best = engine.weights()
                chosen = {f"validation_{key}": figures[key] for key in ("loss", *task.figures) if key in figures}
                last_one = now == total_steps or bool(options.patience and waited >= options.patience)
                log(epoch=reached, step=now, train_loss=since_loss / since_targets, best=improved, last=last_one,
                    seconds=round(time.perf_counter() - started, 2), **chosen)  # fmt: skip
                since_loss, since_targets = 0.0, 0.0
            last_step = now == total_steps or bool(options.patience and waited >= options.patience)
            for sentence in task.noticed(now, noted, last=last_step):
                result.findings.append(sentence)
                if engine.main:
                    tell({"said": sentence})
            asked = int(engine.total(float(signals.seen)))
            if evaluated or asked or (options.checkpoint_every and now % options.checkpoint_every == 0):
                checkpoint()
            if asked:
                code = signals.seen or int(signal.SIGTERM)  # where another process alone was asked
                raise StoppedError(f"stopped after step {now} of {total_steps}; a checkpoint is written", code)

    result.seconds = time.perf_counter() - started
    engine.put(best)
    result.peak_memory_bytes = _peak_memory(engine.device)
    return result


@torch.no_grad()
def predict(
    model: Any,
    task: Task,
    rows: Rows,
    batch_size: int,
    engine: Engine,
    *,
    exact: bool = False,
    final: bool = False,
) -> list[Any]:
    """One answer an example, in the order of the examples; nothing else is kept from batch to batch (T32).

    `exact` computes in float32 even where training did not, so that figures are those of the saved adapter anywhere; a base
    that is stored in 16 bits is computed in them. `final` asks for what the test rows are asked for, which may be generated
    text. A batch for which memory is too short is halved, and those after it; training keeps its own (T34).
    """
    model.eval()
    found: list[Any] = [None] * len(rows.features)
    ask = task.final_answers if final else task.answers

    def asked(model: Any, batch: Any) -> list[Any]:
        with task.storage.arithmetic(engine.device) if exact else engine.autocast():
            return ask(model, batch)

    most = batch_size * max(rows.lengths, default=0)  # which is what memory was planned for
    most = min(most, _READ_ON_A_CPU) if engine.device.type == "cpu" else most
    waiting = sorted_batches(rows.lengths, batch_size, tokens=0 if final else most)
    with Ahead(task, rows.features) as ahead:
        while waiting:
            for some in waiting[:2]:
                ahead.begin(0, some)
            chosen = waiting.pop(0)
            try:
                batch = {k: v.to(engine.device) for k, v in task.collate([ahead.take(0, i) for i in chosen]).items()}
                made = engine.read(model, asked, batch)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(chosen) == 1 or engine.sharded:
                    raise
                batch = {}
                release(engine.device)
                waiting = [half for rows in (chosen, *waiting) for half in stretches(rows, 2) if half]
                continue
            for i, answer in zip(chosen, made, strict=True):
                found[i] = answer
            ahead.forget(0, chosen)
    return task.join(found, rows)


def _epochs(steps: int, steps_per_epoch: int) -> int | float:
    whole, rest = divmod(steps, steps_per_epoch)
    return whole if not rest else round(steps / steps_per_epoch, 2)


def _fingerprint(rows: Rows) -> str:
    digest = hashlib.sha256()
    for feature in rows.features:
        digest.update(json.dumps(feature, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _stop_unless_same(then: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    wrong = [f"{key} was {then.get(key)!r} and is {value!r}" for key, value in now.items() if then.get(key) != value]
    if wrong:
        raise TrainingError(f"--resume: {checkpoint} is of another run: {'; '.join(wrong)}. Put it back, or start a new run")


def _gradients(
    task: Task, read: Callable[[int], Feature], rows: list[int], count: int, engine: Engine
) -> tuple[torch.Tensor, float, int, dict[str, float]]:
    """Forward and backward of a step in `count` parts; its loss, targets over all processes, tokens of this one, and the
    figures that the task noted."""
    made = list(_parts_of_step(task, read, rows, count, engine))
    targets = float(engine.total(float(sum(task.targets_in(batch) for counts, batch in made if counts))))
    loss, tokens, noted = torch.zeros((), device=engine.device), 0, dict[str, torch.Tensor]()
    if task.parts_share and (len(made) > 1 or engine.processes > 1):
        _share(task, made, engine)
    for counts, batch in made:
        task.noted = {}
        part = engine.loss(task.loss_sum, batch, last=batch is made[-1][1]) / targets * (1 if counts else 0)
        for name, figures in task.noted.items():
            noted[name] = noted.get(name, 0) + figures * (1 if counts else 0)
        engine.backward(part)
        loss += part.detach()
        tokens += task.amount(batch) if counts else 0
    means = {}
    for name, (total, number) in ((name, engine.total(figures).tolist()) for name, figures in noted.items()):
        means[name] = total / number
    return engine.total(loss), targets, tokens, means


@torch.no_grad()
def _share(task: Task, made: list[tuple[bool, Batch]], engine: Engine) -> None:
    """Let the parts of all processes know of each other.

    Where weights are in shards every process runs the model equally often, also for a copy of a part that does not count,
    and what it made of that (one entry a part) is told to nobody.
    """
    taken = [(counts, batch if counts else dict(batch)) for counts, batch in made if counts or engine.sharded]

    def gather(entries: list[Any]) -> list[Any]:
        return engine.gather([entry for entry, (counts, _) in zip(entries, taken, strict=True) if counts])

    def share(model: Any, parts: list[Batch]) -> None:
        with engine.autocast():
            task.share(model, parts, gather, engine.process)

    engine.read(engine.model, share, [batch for _, batch in taken])


def _too_little_memory(error: RuntimeError, options: TrainingOptions) -> Exception:
    """What to do where not even single rows fit; other errors as they are."""
    if not is_out_of_memory(error):
        return error
    return TrainingError(
        f"memory ran out ({str(error).splitlines()[0][:200]}). `afina plan` says what a run takes; what helps, the cheapest "
        "first: a larger training.gradient_accumulation, a smaller training.max_length, memory.gradient_checkpointing=true, "
        "training.optimizer=adamw_8bit, memory.weights=int8 or nf4; or memory.limit, and afina chooses"
    )


def _of_process(rows: list[int], engine: Engine) -> list[int]:
    """Rows of a step that this process computes."""
    return parts(rows, engine.processes)[engine.process] or rows[:1]


def _parts_of_step(
    task: Task, read: Callable[[int], Feature], rows: list[int], count: int, engine: Engine
) -> Iterator[tuple[bool, Batch]]:
    """Whether a part of the step counts, and its batch, for each part of this process.

    All processes make the same number of parts, since all must meet in each: where one has no rows of its own left, it goes
    through the motions with a row that does not count.
    """
    own = parts(rows, engine.processes)[engine.process]
    most = min(count, -(-len(rows) // engine.processes))
    for part in stretches(own, most):
        batch = task.collate([read(i) for i in part or rows[:1]])
        yield bool(part), {k: v.to(engine.device) for k, v in batch.items()}


def _without_gradient(model: Any, task: Task, rows: Rows, engine: Engine) -> list[str]:
    """Trained weights that the loss does not depend on, by a trial that leaves nothing behind."""
    before = checkpoints.random_states()
    model.train()
    batch = {k: v.to(engine.device) for k, v in task.collate(rows.features[:2]).items()}
    with engine.autocast():
        loss = task.loss_sum(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    checkpoints.set_random_states(before)
    return idle


def _adapter_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Trained parameters of the adapter itself; those of modules trained whole count where there are no others."""
    whole = {id(p) for m in model.modules() if isinstance(m, SavedModule) for p in m.parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p for name, p in trained.items() if id(p) not in whole} or trained


def _stop_unless_moved(
    watched: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor],
    decayed: float, steps: int, why: str,
) -> None:  # fmt: skip
    """Weight decay shrinks what nothing else moves, so a weight that has only shrunk by it has not moved; where it is less
    than rounding, nothing has shrunk."""
    shrunk = 1.0 - decayed > _ROUNDED / 2

    def still(now: torch.Tensor, then: torch.Tensor) -> bool:
        same = torch.equal(now, then)
        return same or (shrunk and torch.allclose(now, then * decayed, rtol=_ROUNDED * steps, atol=0.0))

    # the small ones first: the first that has moved is the answer, and an embedding takes as long as a step
    if all(still(after[name], before[name]) for name in sorted(watched, key=lambda name: watched[name].numel())):
        why = why or "Is the adapter active, and does the output depend on the layers it adapts? See `afina targets`"
        raise TrainingError(
            f"none of the {len(watched)} adapter weights has changed in the first {steps} steps, so the run would teach "
            f"the model nothing (for example {next(iter(watched), 'there are none')}). {why}"
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
