"""A finished run asked twice: with its adapter, and with the adapter switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afina.errors import ConfigError
from afina.training.trained import TrainedRun

__all__ = ["Compared", "runs_below"]


def runs_below(root: Path) -> list[str]:
    """Finished runs in a folder, the newest first, by their paths below it."""
    found = [p.parent for p in root.glob("**/metrics.json") if (p.parent / "adapter").is_dir()]
    return [str(p.relative_to(root)) for p in sorted(found, key=_finished, reverse=True)]


def _finished(run: Path) -> int:
    return (run / "metrics.json").stat().st_mtime_ns


class Compared:
    """Keeps the run that was asked last, so that it is loaded once."""

    def __init__(self, root: Path):
        self.root = root
        self.kept: tuple[str, int] | None = None  # its name, and when it was finished: a run may be replaced
        self.run: TrainedRun | None = None

    def load(self, name: str) -> TrainedRun:
        """The run of that name. Raises CheckpointError where it is none."""
        folder = self.root / name
        key = (name, _finished(folder)) if (folder / "metrics.json").is_file() else None
        if self.run is None or key is None or key != self.kept:
            self.run = None  # one at a time in memory
            self.run, self.kept = TrainedRun.load(folder), key
        return self.run

    def draws(self, name: str) -> bool:
        """Whether it is asked for pictures. Raises CheckpointError where it is no run."""
        return TrainedRun.described(self.root / name)[1].pipelines

    def texts(self, name: str, text: str, pair: str) -> list[list[str]]:
        """Rows of what is answered, by the adapter and by the base. Raises ConfigError where the run cannot be asked so."""
        trained = self.load(name)
        kind = trained.task.kind
        if kind.media:
            said = f"{kind.what}s" if not kind.of_text else " and ".join(kind.columns)
            raise ConfigError(f"{trained.task.name} reads {said}; ask it with `afina predict`")
        second = kind.columns.get("text_pair")
        reads = second is not None and second.asked and "text_pair" in trained.columns
        if pair and not reads:
            raise ConfigError("this run reads one text; leave the second one empty")
        if second is not None and reads and second.required and not pair:
            raise ConfigError(f"the second text is missing: {second.help}")
        (example,) = trained.asked([{kind.input: text} | ({"text_pair": pair} if reads else {})])
        (after,) = trained.answers([example])
        with trained.model.disable_adapter():
            (before,) = trained.answers([example])
        tuned, plain = (trained.task.columns(answer, example) for answer in (after, before))
        return [[key, value, plain.get(key, "")] for key, value in tuned.items()]

    def pictures(self, name: str, prompt: str, seed: int) -> tuple[Any, Any]:
        """A picture by the base and one by the adapter, from the same noise."""
        trained = self.load(name)
        task: Any = trained.task
        return task.drawn(trained.model, prompt, seed)
