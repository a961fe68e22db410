"""The server as a process: its socket, its start and its end."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

from afina.errors import ConfigError

__all__ = ["bound", "ready", "run"]

_KEEP = 75  # seconds a connection stays open: longer than proxies keep theirs, so that none is closed under a request
_BACKLOG = 2048


def bound(host: str, port: int) -> socket.socket:
    """A socket at that address, before anything is loaded. Raises ConfigError where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r}: {error}") from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        cure = "; take another with --port, or 0 for any that is free" if port else ""
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}{cure}") from None
    made.set_inheritable(True)
    return made


def ready(listening: socket.socket) -> None:
    """From here on who connects waits to be answered, and is not turned away."""
    listening.listen(_BACKLOG)


def run(app: Any, listening: socket.socket, timeout: float) -> None:
    """Answer until SIGINT or SIGTERM; then nothing new is taken, and what runs is finished within `timeout` seconds."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=_KEEP, backlog=_BACKLOG,
        timeout_graceful_shutdown=max(1, int(timeout)), lifespan="on",
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn takes them, and sends them on once it has ended
        signal.signal(number, lambda *_: None)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))
