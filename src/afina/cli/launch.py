"""`afina train --processes 2`: the processes of one machine, started and watched here.

Each is this command again, with the variables that torch looks for. The first speaks for all; what another one says is
kept and shown where it was the first to fail. Ctrl-C and SIGTERM go on to all of them, so that they write a checkpoint
together. Where one ends with an error, the others follow, soon by themselves or after a while by force, and the command
ends with the code of the one that was the cause. torch is not loaded here, so that they start at once. Several machines need
a launcher of their own: see docs/distributed.md.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, Any

from afina.errors import ConfigError

__all__ = ["LOST", "are_to_be_started", "command_again", "end_with_the_launcher", "launch"]

LOST = 75  # exit code of a process that only lost the others
_MARK = "AFINA_LAUNCH"
_GRACE, _FORCE = 30.0, 5.0  # seconds that the others have to end by themselves, and after SIGTERM
_PAUSE = 0.05


@dataclass
class Started:
    """A process and what it says."""

    rank: int
    process: subprocess.Popen[bytes]
    said: IO[bytes] | None  # standard error; None: it speaks for itself

    def last_words(self) -> str:
        """What was said, at most its end."""
        if self.said is None:
            return ""
        self.said.seek(0)
        return self.said.read().decode("utf-8", "replace").strip()[-4000:]


def are_to_be_started(processes: int) -> bool:
    """Whether this command is one process of none yet. Raises ConfigError where another launcher started another number."""
    there = os.environ.get("WORLD_SIZE")
    if there is not None and int(there) != processes:
        raise ConfigError(f"--processes {processes}: a launcher has started {there} already; leave --processes out")
    return there is None and processes > 1


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `afina` with these arguments in so many processes; returns the exit code."""
    with ExitStack() as stack:
        started = [_start(rank, processes, list(arguments), stack) for rank in range(processes)]
        return _watch(started)


def command_again(output: Any) -> str:
    """The command that goes on with a run, as this one was started."""
    count, own = os.environ.get("WORLD_SIZE", "1"), _MARK in os.environ
    start = ["afina"] if own or count == "1" else ["torchrun", "--nproc-per-node", count, "-m", "afina"]
    return shlex.join([*start, "train", *(["--processes", count] if own else []), "--resume", "--output", str(output)])


def end_with_the_launcher() -> None:
    """Be asked to stop where the launcher dies without a word (Linux)."""
    if _MARK in os.environ and sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _start(rank: int, processes: int, arguments: list[str], stack: ExitStack) -> Started:
    said = None if rank == 0 else stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        _MARK: str(os.getpid()),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "afina", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=said,
        process_group=0,  # a Ctrl-C in the terminal comes here alone, and once
    )
    stack.callback(_end, process)
    return Started(rank, process, said)


_ports: list[int] = []


def _port() -> int:
    """A free port, the same for all processes of this command."""
    if not _ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            _ports.append(probe.getsockname()[1])
    return _ports[0]


def _watch(started: list[Started]) -> int:
    """Until all have ended; the exit code of the one that was the cause."""

    def forward(number: int, _: Any) -> None:
        for one in started:
            if one.process.poll() is None:
                one.process.send_signal(number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    cause: Started | None = None
    noticed = 0.0
    try:
        while any(one.process.poll() is None for one in started):
            failed = [one for one in started if one.process.returncode not in (None, 0)]
            if failed and not noticed:
                noticed = time.monotonic()
            if cause is None:
                cause = next((one for one in failed if one.process.returncode != LOST), None)
            if noticed and time.monotonic() - noticed > _GRACE:
                for one in started:
                    _end(one.process)
            time.sleep(_PAUSE)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    failed = [one for one in started if one.process.returncode != 0]
    cause = cause or next((one for one in failed if one.process.returncode != LOST), failed[0] if failed else None)
    return 0 if cause is None else _told(cause, len(started))


def _told(cause: Started, processes: int) -> int:
    """Say what the process that was the cause did not say itself; its exit code."""
    code = cause.process.returncode
    if code < 0:
        name = signal.Signals(-code).name
        memory = "; the system does so where memory runs out" if -code == signal.SIGKILL else ""
        _say(f"Error: process {cause.rank} of {processes} was ended from outside by {name}{memory}. `--resume` goes on from "
             "the last checkpoint")  # fmt: skip
        return 128 - code
    stopped = code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    if cause.said is not None and not stopped:
        _say(cause.last_words() or f"Error: process {cause.rank} of {processes} ended with code {code}")
    return code


def _say(text: str) -> None:
    from rich.text import Text

    from afina.cli.show import console

    console(stderr=True).print(Text(text, style="red"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still there: asked first, then by force."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_FORCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
