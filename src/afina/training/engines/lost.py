"""What a process is told when another one has ended: its own error would only say that a connection closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from afina.errors import AfinaError, LostProcessError
from afina.training.engines.engine import Engine

__all__ = ["told_of_lost_processes"]

_SIGNS = ("closed by peer", "reset by peer", "socket closed", "timed out", "nccl", "gloo", "broken pipe", "remote process")


@contextmanager
def told_of_lost_processes(engine: Engine) -> Iterator[None]:
    """Turn the errors of a broken connection inside the block into LostProcessError."""
    try:
        yield
    except AfinaError:
        raise
    except RuntimeError as error:
        if engine.processes == 1 or not any(sign in str(error).lower() for sign in _SIGNS):
            raise
        raise LostProcessError(
            f"process {engine.process} lost another one of {engine.processes}, which has ended or cannot be reached and may "
            "have said why; `--resume` goes on from the last checkpoint"
        ) from error
