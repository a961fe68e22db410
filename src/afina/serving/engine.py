"""The one thread that computes. It goes round the bases, a step each: a batch of rows that are read, or a token of each text
that is written. Requests wait in the order they came; who has gone away or run out of time is dropped before the next step.

An error in a batch is first tried to be laid at one request's door, by asking each alone; it never ends the thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from afina.memory.measure import is_out_of_memory, release, trim
from afina.serving.limits import Limits
from afina.serving.models import Lane, Models, Served
from afina.serving.reading import read_together
from afina.serving.writing import Cohort, Writing
from afina.tasks.generation import generated, left_padded
from afina.tasks.task import Feature

__all__ = ["Engine", "Reading"]

logger = logging.getLogger("afina.serving")
_TRIM = 128  # rounds after which freed memory is given back; it takes a few milliseconds


@dataclass(eq=False)
class Reading:
    """Features of one request that are read in one batch; `answers` gets one answer each."""

    served: Served
    features: Sequence[Feature]
    answers: Future[list[Any]] = field(default_factory=Future)
    cancelled: bool = False

    @property
    def size(self) -> int:
        """Rows of the model that it takes."""
        return sum(1 + ("pair_ids" in feature) for feature in self.features)

    @property
    def length(self) -> int:
        """Tokens of its longest row."""
        return max(max(len(f["input_ids"]), len(f.get("pair_ids", ()))) for f in self.features)

    def answer(self, made: list[Any]) -> None:
        """Tell who asked, if anyone still waits."""
        with suppress(InvalidStateError):
            self.answers.set_result(made)

    def fail(self, error: BaseException) -> None:
        """The same of an error."""
        with suppress(InvalidStateError):
            self.answers.set_exception(error)


@dataclass
class _Queue:
    """What one base has to do."""

    lane: Lane
    waiting: deque[Any] = field(default_factory=deque)
    cohorts: list[Cohort] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.cohorts


class Engine:
    """Computes what is submitted. `seen(rows, adapters, seconds)` hears of every forward pass."""

    def __init__(self, models: Models, limits: Limits, seen: Callable[[int, int], None] = lambda rows, adapters: None):
        self.limits, self.seen = limits, seen
        self.queues = {id(lane): _Queue(lane) for lane in models.lanes}
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="afina-engine", daemon=True)

    # --- from outside

    def start(self) -> None:
        """Begin to compute."""
        self.thread.start()

    def submit(self, works: Sequence[Any]) -> None:
        """Queue `Reading` and `Writing`."""
        with self.changed:
            for work in works:
                self.queues[id(work.served.lane)].waiting.append(work)
            self.changed.notify()

    @property
    def waiting(self) -> int:
        """What has not begun."""
        return sum(len(queue.waiting) for queue in self.queues.values())

    @property
    def alive(self) -> bool:
        """Whether it computes."""
        return self.thread.is_alive() and not self.closing

    def close(self, timeout: float = 30.0) -> None:
        """Finish what runs, and end."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(timeout)

    # --- the thread

    def _run(self) -> None:
        steps = 0
        while True:
            with self.changed:
                while not self.closing and all(queue.idle for queue in self.queues.values()):
                    self.changed.wait()
                if self.closing and all(queue.idle for queue in self.queues.values()):
                    return
            for queue in self.queues.values():
                if not queue.idle:
                    self._step(queue)
            steps = (steps + 1) % _TRIM
            if not steps:
                trim()

    def _step(self, queue: _Queue) -> None:
        try:
            if queue.lane.writes:
                self._write(queue)
            else:
                self._read(queue)
        except Exception as error:  # what no request is to blame for: everyone of this base is told, and it goes on
            logger.exception("a step failed")
            with self.changed:
                lost = [*queue.waiting, *(row for cohort in queue.cohorts for row in cohort.rows)]
                queue.waiting.clear()
            queue.cohorts.clear()
            for work in lost:
                work.fail(error)

    def _chosen(self, queue: _Queue, fits: Callable[[list[Any], Any], bool], order: Callable[[Any, Any], Any]) -> list[Any]:
        """The oldest of those that wait, and of the others those that go with it, nearest to it first."""
        with self.changed:
            there = [work for work in queue.waiting if not work.cancelled]
            if not there:
                queue.waiting.clear()
                return []
            oldest = there[0]
            chosen = [oldest]
            alike = [w for w in there[1:] if _group(w.served) == _group(oldest.served)]
            for work in sorted(alike, key=lambda work: order(oldest, work)):
                if not fits(chosen, work):
                    break
                chosen.append(work)
            taken = {id(work) for work in chosen}
            queue.waiting = deque(work for work in there if id(work) not in taken)
            return chosen

    # --- rows that are read

    def _read(self, queue: _Queue) -> None:
        def fits(chosen: list[Reading], work: Reading) -> bool:
            return sum(w.size for w in chosen) + work.size <= self.limits.max_batch

        jobs = self._chosen(queue, fits, lambda oldest, work: abs(work.length - oldest.length))
        if jobs:
            self._answer(queue.lane, jobs)

    def _answer(self, lane: Lane, jobs: list[Reading]) -> None:
        try:
            answers = read_together(lane, [(job.served, job.features) for job in jobs])
        except Exception as error:
            if is_out_of_memory(error):
                release(lane.device)
            if len(jobs) == 1:
                jobs[0].fail(error)
                return
            logger.warning("a batch of %d requests failed (%s); each is asked alone", len(jobs), error)
            for job in jobs:
                self._answer(lane, [job])
            return
        self.seen(sum(job.size for job in jobs), len({job.served.adapter for job in jobs}))
        for job, made in zip(jobs, answers, strict=True):
            job.answer(made)

    # --- texts that are written

    def _write(self, queue: _Queue) -> None:
        active = sum(len(cohort.rows) for cohort in queue.cohorts)

        def fits(chosen: list[Writing], work: Writing) -> bool:
            rows, width = len(chosen) + 1, max(len(w.prompt) for w in (*chosen, work))
            return active + rows <= self.limits.max_batch and rows * width <= self.limits.max_tokens

        if active < self.limits.max_batch:
            new = self._chosen(queue, fits, lambda oldest, work: 0)
            whole = [work for work in new if work.served.whole]
            if whole:
                self._write_whole(queue.lane, whole)
            elif new:
                self._begin(queue, new)
        for cohort in list(queue.cohorts):
            cohort.drop_finished()
            if not cohort.rows:
                queue.cohorts.remove(cohort)
                continue
            try:
                cohort.step()
                self.seen(len(cohort.rows), len({row.served.adapter for row in cohort.rows}))
            except Exception as error:
                queue.cohorts.remove(cohort)
                if is_out_of_memory(error):
                    release(queue.lane.device)
                for row in cohort.rows:
                    row.fail(error)
                continue
            cohort.drop_finished()
            if not cohort.rows:
                queue.cohorts.remove(cohort)

    def _begin(self, queue: _Queue, rows: list[Writing]) -> None:
        """Read prompts, and let their texts join those that are being written."""
        try:
            cohort = Cohort(queue.lane, rows)
        except Exception as error:
            if is_out_of_memory(error):
                release(queue.lane.device)
            if len(rows) == 1:
                rows[0].fail(error)
                return
            logger.warning("reading %d prompts at once failed (%s); each is read alone", len(rows), error)
            for row in rows:
                if not row.over:
                    self._begin(queue, [row])
            return
        self.seen(len(rows), len({row.served.adapter for row in rows}))
        cohort.drop_finished()
        if not cohort.rows:
            return
        other = next((c for c in queue.cohorts if c.mergeable), None) if cohort.mergeable else None
        if other is not None:
            other.join(cohort)
        else:
            queue.cohorts.append(cohort)

    def _write_whole(self, lane: Lane, rows: list[Writing]) -> None:
        """Texts of a model that cannot be stepped: one call writes all of each, one after another."""
        for row in rows:
            task: Any = row.served.task
            try:
                ids, mask = left_padded([torch.tensor(row.prompt, device=lane.device)], task.tokenizer.pad_token_id)
                with lane.adapters.runtime.using(lane.state([row.served.adapter])), lane.storage.arithmetic(lane.device):
                    tokens = generated(
                        lane.model.get_base_model(), ids, mask, max_new_tokens=row.most,
                        num_beams=task.options.num_beams, ends=sorted(row.ends), pad=task.tokenizer.pad_token_id,
                    )[0]  # fmt: skip
            except Exception as error:
                row.fail(error)
                continue
            self.seen(1, 1)
            row.written, row.reason = tokens, "length" if len(tokens) >= row.most else "stop"
            row.show()


def _group(served: Served) -> str:
    """Rows of one group can be computed together."""
    if served.whole:
        return f"whole {served.adapter}"
    return "" if served.mixes else served.adapter
