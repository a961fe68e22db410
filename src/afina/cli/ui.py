"""`afina ui`: a page in the browser that trains and compares."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afina.cli.show import console, pairs, quiet

if TYPE_CHECKING:
    from afina.ui.job import Job

__all__ = ["ui"]


def ui(
    runs: Annotated[Path, typer.Argument(help="Folder that runs are written into and compared from.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any that is free.", min=0, max=65535)] = 7860,
) -> None:
    """Open a page that trains on your files and shows base and adapter side by side."""
    from afina.errors import ConfigError, MissingDependencyError

    if runs.exists() and not runs.is_dir():
        raise ConfigError(f"{runs} is a file; give the folder of the runs")
    if importlib.util.find_spec("gradio") is None:
        raise MissingDependencyError("gradio", "ui", "afina ui")
    from afina.serving.server import bound

    with bound(host, port) as free:
        port = free.getsockname()[1]
    quiet()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from afina.ui.page import CSS, make_page

    jobs: list[Job] = []
    page = make_page(runs, jobs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        page.launch(
            server_name=host, server_port=port, quiet=True, share=False, prevent_thread_lock=True, show_error=True,
            footer_links=[], css=CSS, ssr_mode=False, mcp_server=False, enable_monitoring=False,
        )  # fmt: skip
        if host not in ("127.0.0.1", "localhost", "::1"):
            console().print(f"  note: who reaches {host}:{port} can train here, on the files of this user", markup=False)
        pairs({f"http://{f'[{host}]' if ':' in host else host}:{port}": f"the page over {runs}; Ctrl-C ends it"})
        threading.Event().wait()
    except KeyboardInterrupt:
        for job in jobs:
            if job.running:
                console().print("stopping the training after its step, with a checkpoint", markup=False)
                job.stop()
                job.process.wait()
        console().print("stopped", markup=False)
    finally:
        page.close(verbose=False)
