"""What the training benchmarks share: one prepared run, trained in several ways on the same rows, and its figures.

A method is a row of a table: `adapter` trains what `prepare` made, `full` every weight of the same base in the same loop.
Figures are read on the test rows in float32, on the weights of the end or of the best epoch, as the options say.
"""

from __future__ import annotations

import contextlib
import io
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Clock", "adapted", "full", "labelled", "mean_and_spread", "measured", "prepared", "quiet"]

MIB = 2**20


def quiet() -> None:
    """One thread, and no bars or reports of other libraries."""
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class Clock:
    """Seconds of process CPU time, which waits for nobody, and of wall time."""

    def __enter__(self) -> Clock:
        self.cpu, self.wall = -time.process_time(), -time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = self.cpu + time.process_time(), self.wall + time.perf_counter()


def prepared(
    file: Path,
    seed: int,
    method: str | Mapping[str, Any] = "lora",
    model: str = "minilm",
    text: str = "text",
    label: str = "label",
    **training: Any,
) -> Any:
    """The run that `afina train --data FILE --text TEXT --label LABEL --seed SEED` is, before it trains."""
    from afina.training.recipe import Recipe
    from afina.training.run import prepare

    recipe = Recipe()
    recipe.model = model
    recipe.method = {"name": method} if isinstance(method, str) else dict(method)
    recipe.data.file, recipe.data.text, recipe.data.label = str(file), text, label
    recipe.training.seed = seed
    for name, value in training.items():
        setattr(recipe.training, name, value)
    folder = Path(tempfile.gettempdir()) / "afina-benchmark-is-not-written"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return prepare(recipe, folder)


def labelled(run: Any, side: str) -> tuple[list[list[int]], list[int]]:
    """Token ids and class numbers of one side of a run, for other libraries."""
    features = run.rows[side].features
    return [f["input_ids"] for f in features], [f["label"] for f in features]


def measured(run: Any, model: Any, fit: Callable[[Any, Path], Any], side: str = "test") -> dict[str, Any]:
    """Train with `fit(engine, folder)` and read one side; a row of results."""
    from afina.memory.heap import large_tensors_kept
    from afina.training.loop import make_engine, predict

    engine = make_engine(run.precision)
    kept = large_tensors_kept(run.recipe.memory.roomy(engine.device.type))  # as a run has it
    with tempfile.TemporaryDirectory() as folder, kept, Clock() as clock:
        fitted = fit(engine, Path(folder))
    rows = run.rows[side]
    answers = predict(model, run.task, rows, run.recipe.training.batch_size * 2, engine, exact=True)
    return figures(run.task.metrics(answers, rows.examples)) | {
        "steps": fitted.steps, "best_epoch": fitted.best_epoch, "cpu_s": round(clock.cpu, 1), "wall_s": round(clock.wall, 1),
        "precision": run.precision,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip


def figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Of all figures of a classification those that are shown."""
    return {
        "rows": metrics["rows"],
        "accuracy": round(metrics["accuracy"], 5),
        "macro_f1": round(metrics["macro_f1"], 5),
        "loss": round(metrics["loss"], 5),
        "f1": {label: round(values["f1"], 5) for label, values in metrics["per_class"].items()},
    }


def adapted(run: Any, side: str = "test") -> dict[str, Any]:
    """Train the adapter that was prepared; with the bytes of the file that keeps it."""
    from afina.training.loop import fit

    def train(engine: Any, folder: Path) -> Any:
        return fit(run.model, run.task, run.rows["train"], run.rows["validation"], run.recipe.training, engine, folder)

    row = measured(run, run.model, train, side)
    with tempfile.TemporaryDirectory() as folder:
        run.model.save_pretrained(folder)
        return row | {"stored_mib": stored(Path(folder))}


def full(run: Any, learning_rate: float, side: str = "test") -> dict[str, Any]:
    """Train every weight of a fresh base in the same loop, on the same rows, with the same options but the rate."""
    import dataclasses

    import torch

    from afina.training.loop import fit

    torch.manual_seed(run.recipe.training.seed)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model = run.task.load_model(run.source.path).requires_grad_(True)
    options = dataclasses.replace(run.recipe.training, learning_rate=learning_rate)

    def train(engine: Any, folder: Path) -> Any:
        return fit(model, run.task, run.rows["train"], run.rows["validation"], options, engine, folder)

    row = measured(run, model, train, side)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return row | {"stored_mib": stored(Path(folder))}


def stored(folder: Path) -> float:
    """MiB of the weights in a folder."""
    return round(sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / MIB, 2)


def mean_and_spread(values: Sequence[float], form: str = ".3f") -> str:
    """The mean and, where there are several, half of what lies between the least and the greatest."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format((max(values) - min(values)) / 2, form)}"
