"""Pictures that a run made before and after training, side by side: the same prompt, the same seed."""

from __future__ import annotations

import base64

from afina.report.folder import RunFolder
from afina.report.markup import Markup, el, table

__all__ = ["drawn"]


def drawn(run: RunFolder) -> Markup | None:
    """A row for each prompt and seed; None where none were made."""
    rows = []
    for made in run.metrics.get("pictures") or []:
        shown = [_embedded(run, str(made[when])) for when in ("before", "after")]
        rows.append([f"{made['prompt']} (seed {made['seed']})", *(one or "not there" for one in shown)])
    if not rows:
        return None
    return el(
        "div",
        el("p", "Each row begins with the same noise; what differs is the adapter."),
        table("Pictures before and after training", ["prompt", "before", "after"], rows, hidden=True),
    )


def _embedded(run: RunFolder, name: str) -> Markup | None:
    path = run.path / name
    if not path.is_file():
        return None
    data = base64.b64encode(path.read_bytes()).decode()
    return el("img", src=f"data:image/png;base64,{data}", alt=name, width="256", loading="lazy")
