"""Work that can be halted in the middle: `Turn`.

Each piece of work has a thread of its own, but only one of them runs at any moment, and only while it is resumed; a run
of many functions can so be halted deep inside and go on later, as a coroutine would, without being written as one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Turn"]


class Turn:
    """Work in a thread, begun and continued by `resume`, which comes back when the work asks for something or is over."""

    def __init__(self, work: Callable[[], Any]):
        self.work = work
        self.asked: Any = None  # what the work waits for
        self.result: Any = None
        self.error: BaseException | None = None  # what the work ended with
        self.over = False
        self._answer: Any = None
        self._thrown: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), daemon=True)

    def resume(self, answer: Any = None, *, error: BaseException | None = None) -> None:
        """Go on with the answer to what was asked, or with an error that is raised there; until the next question."""
        self._answer, self._thrown = answer, error
        if not self._thread.ident:
            self._thread.start()
        self._go.release()
        self._back.acquire()

    def ask(self, question: Any) -> Any:
        """Within the work: halt with a question; returns the answer."""
        self.asked = question
        self._back.release()
        self._go.acquire()
        self.asked, answer = None, self._answer
        self._answer = None
        if self._thrown is not None:
            raise self._thrown
        return answer

    def end(self) -> None:
        """Let the work end where it stands, as a generator that is closed, so that it gives back what it took."""
        if self._thread.ident and not self.over:
            self.resume(error=GeneratorExit())

    def _run(self, threads: int) -> None:
        self._go.acquire()
        torch.set_num_threads(threads)
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error
        self.over = True
        self._back.release()
