"""Rows of files read by threads while the step before is computed: `Ahead`.

What is read is the same whoever reads it and when: what is drawn of a row follows from seed, step and row alone, so that a
run that goes on from a checkpoint, in other parts or in more processes, draws the same. No more than two steps are held.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from afina.tasks.task import Feature, Task

__all__ = ["Ahead"]

_THREADS = 4


class Ahead:
    """The features of a side, made ready by `Task.ready` before they are asked for; as they are where they name no files.

    `seed` seeds what is drawn of a row in a step; None: nothing is drawn.
    """

    def __init__(self, task: Task, features: Sequence[Feature], seed: int | None = None):
        self.task, self.features, self.seed = task, features, seed
        self.pool: ThreadPoolExecutor | None = None
        self.waiting: dict[tuple[int, int], Future[Feature]] = {}

    def __enter__(self) -> Ahead:
        if self.task.reads_files:
            self.pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="ahead")
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        self.pool, self.waiting = None, {}

    def begin(self, step: int, rows: Iterable[int]) -> None:
        """Begin to read rows of a step; those that have been begun are left alone."""
        if self.pool is None:
            return
        for row in rows:
            if (step, row) not in self.waiting:
                chance = None if self.seed is None else f"{self.seed}/{step}/{row}"
                self.waiting[step, row] = self.pool.submit(self.task.ready, self.features[row], chance)

    def take(self, step: int, row: int) -> Feature:
        """A row of a step; it may be taken again until it is forgotten. Raises what reading it raised."""
        if self.pool is None:
            return self.features[row]
        self.begin(step, [row])
        return self.waiting[step, row].result()

    def forget(self, step: int, rows: Iterable[int] | None = None) -> None:
        """Let go rows of a step, or all of it."""
        for key in [k for k in self.waiting if k[0] == step] if rows is None else [(step, row) for row in rows]:
            self.waiting.pop(key, None)
