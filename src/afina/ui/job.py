"""A training that the page has started: a process of its own, which the page watches by the files of the run folder.

What it does is what the command line does, so a run from the page is a run like any other: it may be gone on with, repeated
and exported, and it does not end with the browser. To stop it is to send it SIGTERM: it writes a checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Job", "State"]

_TAIL = 8000  # bytes of what it printed that are shown


@dataclass
class State:
    """Where a training is."""

    said: str  # in a sentence
    running: bool
    steps: list[dict[str, Any]] = field(default_factory=list)  # of log.jsonl: one line a step ...
    readings: list[dict[str, Any]] = field(default_factory=list)  # ... and one line an evaluation
    printed: str = ""  # the command, and the end of what it printed


class Job:
    """One training by `words` of the command line, into the folder `output`."""

    def __init__(self, words: Sequence[str], output: Path):
        self.words, self.output = list(words), output
        self.stopped, self.began = False, time.time()  # a log from before is of a run that is replaced or gone on with
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the job)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "afina", *self.words], stdout=self.printed, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
            start_new_session=True,  # Ctrl-C in the terminal of the page ends it by `stop`, once
        )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask it, once, to stop after the step it is in; a second signal would not let it write its checkpoint."""
        if self.running and not self.stopped:
            self.stopped = True
            self.process.terminate()

    def state(self) -> State:
        """Where it is now."""
        running, log = self.running, self.output / "log.jsonl"
        steps, readings = _read(log) if log.is_file() and log.stat().st_mtime >= self.began else ([], [])
        size = os.fstat(self.printed.fileno()).st_size
        tail = os.pread(self.printed.fileno(), _TAIL, max(0, size - _TAIL)).decode("utf-8", "replace")
        where = f"step {steps[-1]['step']} of {steps[-1]['of']}" if steps else "preparing"
        if running:
            said = f"stopping after {where}" if self.stopped and steps else "stopping" if self.stopped else where
        else:
            said = _ended(self.process.returncode)
        return State(said, running, steps, readings, f"$ {shlex.join(['afina', *self.words])}\n{tail}")


def _ended(code: int) -> str:
    """What became of a process, by its exit code."""
    if code == 0:
        return "done"
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        return "stopped; a checkpoint is written"
    if code == -signal.SIGTERM:
        return "stopped, outside of its steps"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else "it could not be done; the reason is below"


def _read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    steps, readings = list[dict[str, Any]](), list[dict[str, Any]]()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
        except ValueError:  # it is being written
            continue
        (readings if "validation_loss" in content else steps).append(content)
    return steps, readings
