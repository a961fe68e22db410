"""The first process of each machine prepares before the others, which then find the encoded rows in the cache (T40).

The others wait for a file, not in a collective, so that preparing may take as long as it takes; what ends the first with
an error ends them without a second message. The file's name follows from the process that started them all.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import psutil

from afina.errors import LostProcessError

__all__ = ["first_of_the_node"]

_PATIENCE = 600.0  # seconds for the first process to begin
_PAUSE = 0.05
_turns = count()


@contextmanager
def first_of_the_node() -> Iterator[None]:
    """The block, run by the first process of this machine and after it by the others.

    Raises LostProcessError in the others where the first failed, which tells the reason itself.
    """
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if of_node < 2 or "LOCAL_RANK" not in os.environ:
        yield
        return
    sign = _sign(next(_turns))
    if int(os.environ["LOCAL_RANK"]) > 0:
        _wait(sign)
        yield
        return
    _write(sign, f"began {os.getpid()}")
    try:
        yield
    except BaseException:
        _write(sign, "failed")
        raise
    _write(sign, "done")


def _sign(turn: int) -> Path:
    """A file that the processes which one launcher started agree on."""
    parent = psutil.Process(os.getppid())
    launch = [os.environ.get(key, "") for key in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "AFINA_LAUNCH")]
    name = "-".join([str(parent.pid), f"{parent.create_time():.2f}", *launch, str(turn)])
    folder = Path(tempfile.gettempdir()) / f"afina-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for old in folder.iterdir():
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 7 * 86400:
                old.unlink()
    return folder / name


def _write(sign: Path, text: str) -> None:
    beside = sign.with_suffix(f".{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, sign)


def _wait(sign: Path) -> None:
    started = time.monotonic()
    while True:
        words = sign.read_text(encoding="utf-8").split() if sign.is_file() else [""]
        if words[0] == "done":
            return
        if words[0] == "failed":
            raise LostProcessError("the first process of this machine could not prepare the run and says why", told=True)
        if words[0] == "began" and not psutil.pid_exists(int(words[1])):
            raise LostProcessError("the first process of this machine ended while it prepared the run")
        if not words[0] and time.monotonic() - started > _PATIENCE:
            raise LostProcessError(f"the first process of this machine has not begun to prepare within {_PATIENCE:.0f} s")
        time.sleep(_PAUSE)
