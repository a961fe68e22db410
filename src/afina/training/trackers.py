"""Figures of a run sent to TensorBoard, MLflow, W&B or trackio as well, through Accelerate's trackers.

Where they go is the tracker's affair and set as its own documentation says (`WANDB_MODE`, `MLFLOW_TRACKING_URI`,
`TRACKIO_DIR`, ...). TensorBoard and W&B keep their files in the run folder. Without a tracker nothing of this is imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from afina.errors import ConfigError, Problems, did_you_mean
from afina.report.comparison import flat

__all__ = ["TRACKERS", "Trackers", "check_trackers"]

TRACKERS = {"mlflow": "mlflow", "tensorboard": "'afina[tensorboard]'", "trackio": "trackio", "wandb": "wandb"}  # to install
_PROJECT = "afina"
_TRAINING = ("loss", "learning_rate", "gradient_norm")  # keys of a line of the log that are drawn; of an evaluation, all


def check_trackers(names: Sequence[str], problems: Problems, spell: Callable[[str], str] = str) -> None:
    """Add every tracker that does not exist or whose library is missing."""
    for name in names:
        where = f"{spell('training.trackers')}={name}"
        if name not in TRACKERS:
            problems.add(f"{where}: there is no such tracker.{did_you_mean(name, TRACKERS)}")
        elif importlib.util.find_spec(name) is None:
            problems.add(f"{where} needs a library that is not installed: pip install {TRACKERS[name]}")


class Trackers:
    """Takes the lines of `log.jsonl` as they are made; a context that begins and ends one run of each tracker.

    `recipe` is stored with the run. A run that goes on after `step` hides what TensorBoard has of later ones.
    Raises ConfigError where a tracker does not begin, for example because nobody has logged in to it.
    """

    def __init__(self, names: Sequence[str], folder: Path, recipe: Mapping[str, Any], step: int = 0):
        self.names, self.folder, self.recipe, self.step = list(dict.fromkeys(names)), folder, recipe, step
        self.made: list[Any] = []

    def __enter__(self) -> Trackers:
        for name in self.names:
            try:
                self.made.append(self._begun(name))
            except Exception as error:  # each library has exceptions of its own
                self.__exit__()
                reason = str(error).strip() or type(error).__name__
                where = f"training.trackers={name}"
                raise ConfigError(f"{where}: it did not begin ({reason}); leave it out, or mend that") from error
        return self

    def __exit__(self, *_: object) -> None:
        while self.made:
            self.made.pop().finish()

    def _begun(self, name: str) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        title = self.folder.name
        options: dict[str, dict[str, Any]] = {
            "mlflow": {"run_name": title},
            "tensorboard": {"logging_dir": str(self.folder), "purge_step": self.step + 1 if self.step else None},
            "trackio": {"name": title},
            "wandb": {"name": title, "dir": str(self.folder)},
        }
        project = {"tensorboard": name, "wandb": os.environ.get("WANDB_PROJECT", _PROJECT)}.get(name, _PROJECT)
        tracker: Any = LOGGER_TYPE_TO_CLASS[name](project, **options[name])
        tracker.start()
        said = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat(self.recipe).items()}
        tracker.store_init_configuration(said)
        return tracker

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Send one line of the log."""
        if not self.made or "said" in line:
            return
        self.step = line["step"]
        if "validation_loss" in line:
            self._send({k.replace("_", "/", 1): v for k, v in line.items() if k.startswith("validation_")})
        else:
            self._send({f"train/{k}": line[k] for k in _TRAINING if k in line})

    def tested(self, figures: Mapping[str, Any]) -> None:
        """Send the single numbers among the figures of the test rows."""
        numbers = {k: v for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        self._send({f"test/{k}": v for k, v in numbers.items()})

    def _send(self, values: Mapping[str, Any]) -> None:
        for tracker in self.made:
            tracker.log(dict(values), step=self.step)
