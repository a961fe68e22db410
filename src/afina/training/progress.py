"""Training as it is watched: a bar on a terminal, plain lines in a file, nothing where that is asked for.

`Progress` takes the lines of `log.jsonl` as they are made. On a terminal two lines at the bottom say where the run is, at
what loss, how fast, in how much memory and for how long still; what each evaluation found stays above them. Elsewhere an
evaluation is one line, and between two of them a step is told seldom: after half a minute, and later after a twentieth of
the time that has passed, so that the file of a long run stays short.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from afina.report.words import duration, size
from afina.tasks.task import Figure

__all__ = ["Progress", "memory"]

_PAUSE, _SHARE = 30.0, 0.05  # seconds between plain lines, and the share of the time so far once that is more
_STEPS = 50  # steps that the speed is a mean of


def memory() -> int:
    """Bytes: the most that the GPU held so far; without one, what the process holds now."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


class Progress:
    """What `fit` tells, shown; a context, so that the bar goes whatever happens.

    `figures` are those of the task, by their keys; `unit` is what its rows are counted in. `console` is where to print,
    standard output unless given; `clock` gives seconds. Nothing is shown before the first line: of several processes
    only the one that logs speaks.
    """

    def __init__(
        self,
        figures: Mapping[str, Figure],
        *,
        unit: str = "tokens",
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.figures, self.unit, self.quiet, self.clock = figures, unit, quiet, clock
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.lively = self.console.is_interactive and self.console.file.isatty()
        self.live: Live | None = None
        self.started = self.spoken = clock()
        self.first = 0  # the step before the first of this session
        self.line: dict[str, Any] = {}
        self.recent: deque[tuple[float, int]] = deque(maxlen=_STEPS)  # when, and how many tokens had been read

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Show one line of the log."""
        if self.quiet:
            return
        if "said" in line:
            self._say([line["said"]])
        elif "validation_loss" in line:
            self._evaluated(line)
        else:
            self._stepped(line)

    # --- lines of the log

    def _stepped(self, line: Mapping[str, Any]) -> None:
        now = self.clock()
        if not self.line:
            self.first = line["step"] - 1
        self.line = dict(line)
        if "tokens" in line:
            self.recent.append((now, line["tokens"]))
        if self.lively:
            if self.live is None:
                self.live = Live(get_renderable=self._drawn, console=self.console, transient=True)
                self.live.start()
        elif line["step"] < line["of"] and now - self.spoken >= max(_PAUSE, _SHARE * (now - self.started)):
            where = f"step {line['step']:,} of {line['of']:,} (epoch {line['epoch']})"
            self._say([where, *self._state(), self._left()])

    def _evaluated(self, line: Mapping[str, Any]) -> None:
        known = {"loss": Figure("loss"), **self.figures}
        read = {key: line[f"validation_{key}"] for key in known if f"validation_{key}" in line}
        found = [f"{known[key].title} {known[key].shown(value)}" for key, value in read.items()]
        parts = [f"epoch {line['epoch']}", f"loss {line['train_loss']:.3f}", f" validation: {found[0]}", *found[1:]]
        parts.append(f" {duration(line['seconds'])}")
        self._say([*parts, "best so far"] if line["best"] else parts)
        self.recent.clear()  # reading the validation rows is no training
        if "tokens" in self.line:
            self.recent.append((self.clock(), self.line["tokens"]))
        if line["last"]:
            self.close()

    # --- how it is said

    def _say(self, parts: Sequence[str]) -> None:
        """One line; on a terminal that is too narrow for it, several that break between the parts."""
        self.spoken = self.clock()
        lines, width = [f"  {parts[0]}"], self.console.width if self.lively else None
        for part in parts[1:]:
            if width is not None and len(lines[-1]) + 2 + len(part) > width:
                lines.append(f"    {part.strip()}")
            else:
                lines[-1] += f"  {part}"
        for text in lines:
            said = Text(text)
            if self.lively:
                said.highlight_words(["best so far"], "green")
            self.console.print(said)

    def _state(self) -> list[str]:
        line = self.line
        said = [f"loss {line['loss']:.3f}", f"learning rate {line['learning_rate']:.1e}"]
        if (speed := self._speed()) is not None:
            said.append(f"{speed:,.0f} {self.unit}/s")
        return [*said, size(memory())]

    def _speed(self) -> float | None:
        """Tokens of a second, over the last steps."""
        if len(self.recent) < 2 or self.recent[-1][0] <= self.recent[0][0]:
            return None
        (start, before), (end, after) = self.recent[0], self.recent[-1]
        return (after - before) / (end - start)

    def _left(self) -> str:
        done, line = self.line["step"] - self.first, self.line
        return f"{duration((self.clock() - self.started) / done * (line['of'] - line['step']))} left"

    def _drawn(self) -> RenderableType:
        """The two lines at the bottom."""
        line = self.line
        top = Table.grid(padding=(0, 2), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True)
        bar = ProgressBar(total=line["of"], completed=line["step"])
        top.add_row(f"  epoch {line['epoch']}", bar, f"step {line['step']:,} of {line['of']:,}  {self._left()}")
        state = Text(f"  {'  '.join(self._state())}", no_wrap=True, overflow="ellipsis", style="dim")
        return Group(top, state)
