"""Being asked to stop: Ctrl-C and SIGTERM wait for the step under way."""

from __future__ import annotations

import signal
import threading
from typing import Any

__all__ = ["Signals"]


class Signals:
    """Notes Ctrl-C and SIGTERM instead of dying of them, so that the step under way is finished; a second one ends at once.

    `seen` is the signal's number, 0 for none. Outside the main thread, where Python takes no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.seen, self.old = 0, dict[int, Any]()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.seen = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
        self.old = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
