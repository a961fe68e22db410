"""Timing two things side by side on a machine that others use too.

Contestants take turns, in an order that is reversed every round, with garbage collection off while the clock runs. What is
reported is medians of process CPU time (which waits for nobody) and of wall time, and the ratios of these; absolute
times mean little.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = [
    "Contestant",
    "Timing",
    "about",
    "alternate",
    "between_markers",
    "geometric_mean",
    "parser_of",
    "put_into",
    "read_json",
    "table",
    "write_json",
]


@dataclass
class Contestant:
    """One way to do the job: `run` is timed, on what `prepare` made, which is not."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Timing:
    """Seconds of each sample, per call of `run`."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def median(self, clock: str = "cpu") -> float:
        """Median in seconds, of CPU or wall time."""
        return statistics.median(getattr(self, clock))


def alternate(
    contestants: Mapping[str, Contestant], rounds: int, *, slice_s: float = 0.0, warmup: int = 1
) -> dict[str, Timing]:
    """Time the contestants in turn, `rounds` samples each after `warmup` unmeasured ones.

    A sample is one call, or as many calls as fill `slice_s` seconds (the same number for all contestants).
    """
    timings = {name: Timing() for name in contestants}
    calls = 1
    for number in range(-warmup, rounds):
        order = list(contestants.items())
        for name, contestant in order if number % 2 else reversed(order):
            made = contestant.prepare()
            if not slice_s:
                gc.collect()
            gc.disable()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(calls):
                contestant.run(made)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            gc.enable()
            if number >= 0:
                timings[name].cpu.append(cpu / calls)
                timings[name].wall.append(wall / calls)
            elif slice_s and number == -1:
                calls = max(calls, int(slice_s / max(wall / calls, 1e-6)))
            del made
        if slice_s and number % 8 == 0:
            gc.collect()
    return timings


def geometric_mean(values: Iterable[float]) -> float:
    """The mean to be used for ratios; values below 0.001 count as that."""
    logs = [math.log(max(v, 1e-3)) for v in values]
    return math.exp(sum(logs) / len(logs))


def about(packages: Sequence[str], threads: int) -> dict[str, Any]:
    """Machine, versions, threads and date."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def parser_of(doc: str | None, results: Path | None = None, *, renders: bool = True) -> argparse.ArgumentParser:
    """What every script is asked with: its docstring as help, `--markdown`, and `--output` where there may be another file
    of results than `results`. `renders`: with `--markdown` nothing is measured."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if results is not None:
        shown = f"benchmarks/results/{results.name}"
        parser.add_argument("--output", type=Path, metavar="FILE", default=results, help=f"of results [{shown}]")
    said = "render the file of results into this document and measure nothing" if renders else "put the figures in here"
    parser.add_argument("--markdown", type=Path, metavar="DOCUMENT", help=said)
    return parser


def read_json(path: Path) -> Any:
    """What `write_json` has written."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write results in a form that is easy to compare between versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; columns after the first are set to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def between_markers(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise SystemExit(f"the file needs the lines {begin} and {end}, between which the tables go")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{content.strip()}\n{end}{rest.split(end, 1)[1]}"


def put_into(document: Path | None, name: str, content: str) -> None:
    """Put `content` between the markers `name` of a document, where one is given."""
    if document is not None:
        text = document.read_text(encoding="utf-8")
        document.write_text(between_markers(text, name, content), encoding="utf-8")
