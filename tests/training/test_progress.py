"""Training is shown as a bar on a terminal, as few plain lines elsewhere, and not at all when asked."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys

import pytest
from rich.console import Console

from afina.tasks.task import Figure
from afina.training.progress import Progress

FIGURES = {"macro_f1": Figure("macro F1"), "accuracy": Figure("accuracy", ".1%"), "loss": Figure("loss", better=-1)}


def step(number, of=30, **more):
    return {"epoch": (number - 1) // 10 + 1, "step": number, "of": of, "loss": 1 / number, "learning_rate": 1e-3,
            "tokens": 211 * number, **more}  # fmt: skip


def evaluation(number, **more):
    return {"epoch": number // 10, "step": number, "train_loss": 0.5, "best": True, "seconds": 7.0, "validation_loss": 0.25,
            "validation_macro_f1": 0.875, "validation_accuracy": 0.9, "last": number == 30, **more}  # fmt: skip


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def plain(**more):
    file, clock = io.StringIO(), Clock()
    return Progress(FIGURES, console=Console(file=file, soft_wrap=True), clock=clock, **more), file, clock


def test_a_file_gets_plain_lines():
    progress, file, clock = plain()
    with progress:
        for number in range(1, 31):
            clock.now += 4
            progress(step(number))
            if number % 10 == 0:
                progress(evaluation(number))
    lines = file.getvalue().splitlines()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", file.getvalue())
    assert [line.split("  ")[1] for line in lines] == [
        "step 8 of 30 (epoch 1)", "epoch 1", "step 18 of 30 (epoch 2)", "epoch 2", "step 28 of 30 (epoch 3)", "epoch 3",
    ]  # fmt: skip
    assert re.search(r"loss 0\.125  learning rate 1\.0e-03  53 tokens/s  [\d.]+ (M|G)iB  1 min 28 s left", lines[0])
    found = "validation: loss 0.250  macro F1 0.875  accuracy 90.0%   7.0 s  best so far"
    assert lines[1] == f"  epoch 1  loss 0.500   {found}"


def test_the_file_of_a_long_run_stays_short():
    progress, file, clock = plain()
    for number in range(1, 50_001):
        clock.now += 7
        progress(step(number, of=50_000))
    hours = clock.now / 3600
    count = file.getvalue().count("\n")
    assert hours > 90
    assert 50 < count < 150


def test_the_time_left_is_that_of_this_session():
    progress, file, clock = plain()
    clock.now = 40.0
    progress(step(26))  # resumed after step 25
    assert "2 min 40 s left" in file.getvalue()


def test_figures_that_were_not_read_are_not_told():
    progress, file, _ = plain()
    line = evaluation(10)
    del line["validation_macro_f1"]
    progress(line)
    assert "macro F1" not in file.getvalue()
    assert "accuracy 90.0%" in file.getvalue()


def test_quiet_says_nothing():
    progress, file, clock = plain(quiet=True)
    with progress:
        for number in range(1, 31):
            clock.now += 100
            progress(step(number))
            progress(evaluation(number))
    assert file.getvalue() == ""


SCRIPT = """
import sys, time
sys.path[:0] = [{here!r}]
from test_progress import FIGURES, evaluation, step
from afina.training.progress import Progress
with Progress(FIGURES) as progress:
    for number in range(1, 26):
        progress(step(number))
        if number % 10 == 0:
            progress(evaluation(number))
            print("another library talks")
    progress.live.refresh()
    print("SEEN", flush=True)
    time.sleep(0.6)
    {end}
    assert progress.live
    progress(evaluation(25, best=False, last=True))
    assert not progress.live  # the bar is gone before the test rows are read
print("the end")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize(("columns", "end"), [(80, ""), (120, "raise SystemExit(3)")])
def test_a_terminal_gets_a_bar_that_goes_away(columns, end):
    """On a screen of 80 and of 120 columns; also where training stops with an error."""
    import fcntl
    import pty
    import termios

    pyte = pytest.importorskip("pyte")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm"}
    code = SCRIPT.format(here=os.path.dirname(__file__), end=end)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    screen = pyte.Screen(columns, 24)
    stream, during, raw = pyte.ByteStream(screen), [], b""
    while True:
        try:
            said = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
        if not said:
            break
        raw += said
        stream.feed(said)
        shown = [line.rstrip() for line in screen.display if line.strip()]
        if "SEEN" in shown and "tokens/s" in shown[-1]:
            during = shown
    os.close(ours)
    assert child.wait() == (3 if end else 0)
    after = [line.rstrip() for line in screen.display if line.strip()]
    assert re.fullmatch(r"  epoch 3  ━+[╸╺]?━+  step 25 of 30  [\d.]+ s left", during[-2]), during
    assert re.fullmatch(r"  loss 0\.040  learning rate 1\.0e-03  [\d,]+ tokens/s  [\d.]+ (M|G)iB", during[-1])
    kept = during[: during.index("SEEN") + 1]
    assert after[: len(kept)] == kept
    assert not [line for line in after if "tokens/s" in line or "━" in line]
    assert (after[-1] == "the end") == (not end)
    assert sum("best so far" in line for line in after) == after.count("another library talks") == 2
    assert len(kept) == (7 if columns == 80 else 5)
    assert raw.count(b"\x1b[?25l") == raw.count(b"\x1b[?25h") > 0, "the cursor is back"
