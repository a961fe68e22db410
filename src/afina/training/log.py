"""What a run says of each step, in a file that a run that goes on continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from afina.core.files import write_atomically
from afina.errors import TrainingError

__all__ = ["Log"]


class Log:
    """`log.jsonl`, one line a call, in the main process alone; a resumed run drops the lines after its checkpoint.

    `keep`: the step of that checkpoint; None starts a new file.
    """

    def __init__(self, path: Path, write: bool, tell: Callable[[dict[str, Any]], None], keep: int | None):
        self.tell, self.file, self.path = tell, None, path
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_text(encoding="utf-8").splitlines(keepends=True) if keep is not None and path.is_file() else []
            kept = [line for line in old if line.endswith("\n") and json.loads(line)["step"] <= (keep or 0)]
            write_atomically(path, lambda beside: beside.write_text("".join(kept), encoding="utf-8"))
            self.file = path.open("a", encoding="utf-8")

    def __call__(self, **line: Any) -> None:
        if self.file is not None:
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as error:
                raise TrainingError(
                    f"{self.path} could not be written at step {line['step']} ({error.strerror}); make room and go on from "
                    "the last checkpoint with --resume"
                ) from error
            self.tell(line)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with suppress(OSError):  # every line was flushed, and one that was not has been told
                self.file.close()
