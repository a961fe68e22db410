"""`afina serve`: answers over HTTP, in OpenAI's form where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from afina.cli.show import console, pairs, quiet, table

__all__ = ["serve"]


def serve(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs; NAME=FOLDER where the folder's name will not do.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="AFINA_API_KEY", help="Key that requests must carry. Others see a command line; the variable they do not."
        ),
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest request, for example 1MB.")] = "1MB",
    queue: Annotated[int, typer.Option(help="Requests inside at once, waiting or being answered.", min=1)] = 512,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.", min=0.1)] = 120.0,
    max_batch: Annotated[int, typer.Option(help="Rows of one forward pass.", min=1)] = 32,
    vllm: Annotated[bool, typer.Option("--vllm", help="Print the command that serves them on vLLM, and stop.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads that compute (default: as many as cores).", min=1)] = None,
) -> None:
    """Serve tuned models: those on one base share it, and their rows one forward pass."""
    from afina.errors import ConfigError, MissingDependencyError, Problems
    from afina.memory.sizes import parse_size

    problems, size = Problems("afina serve"), 1
    try:
        size = parse_size(max_body)
    except ConfigError as error:
        problems.add(f"--max-body: {error}")
    if api_key is not None and not api_key.strip():
        problems.add("--api-key (or AFINA_API_KEY) is empty; give a key, or leave it out")
    problems.raise_as(ConfigError)
    from afina.serving.models import named_runs

    named = named_runs(runs)
    if vllm:
        from afina.export.vllm import command

        print(command(named, host, port))
        return
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(str(error.name), "serve", "afina serve") from None
    quiet()
    import torch

    from afina.serving.app import make_app
    from afina.serving.limits import Limits
    from afina.serving.models import load_models
    from afina.serving.server import bound, ready, run
    from afina.serving.trial import try_out

    if threads is not None:
        torch.set_num_threads(threads)
    limits = Limits(size, queue, timeout, max_batch, api_key=api_key and api_key.strip())
    listening = bound(host, port)
    try:
        err = console(stderr=True)
        models = load_models(named, lambda line: err.print(line, markup=False))
        try_out(models)
        app = make_app(models, limits)
        ready(listening)
        _show(models, host, listening.getsockname()[1], limits)
        run(app, listening, timeout)
        console().print("stopped", markup=False)
    finally:
        listening.close()


def _show(models: Any, host: str, port: int, limits: Any) -> None:
    """What can be asked, and where."""
    chats = ("causal_lm", "dpo", "grpo", "kto", "orpo")
    paths = {**dict.fromkeys(chats, "/v1/chat/completions, /v1/completions"), "seq2seq": "/v1/completions",
             "sentence_similarity": "/v1/embeddings, /classify"}  # fmt: skip
    rows = []
    for served in models.by_name.values():
        path = paths.get(served.task.name, "/classify")
        if served.task.name in chats and (served.task.prompts is None or _plain_base(served)):
            path = "/v1/completions"
        if not served.tuned:
            path = path.removesuffix(", /classify")
        base = Path(served.lane.source.name).name
        rows.append([served.name, served.task.name, f"{base} ({models.lanes.index(served.lane) + 1})", path])
    table(["model", "task", "base", "paths"], rows)
    for note in models.notes:
        console().print(f"  note: {note}", markup=False)
    if limits.api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        console().print(f"  note: there is no --api-key: who reaches {host}:{port} can ask", markup=False)
    pairs({f"http://{f'[{host}]' if ':' in host else host}:{port}": "answering; Ctrl-C stops"})


def _plain_base(served: Any) -> bool:
    return not served.tuned and served.task.learned.get("template") != "own"
