"""The points of a sweep, as they lie in its folder: what each changes, whether it is finished, what it found.

`sweep.json` says what the points are, with the recipe of the first, so that points of other recipes are never put beside
them, and is the same in every process of the sweep. Everything else is read from the run folders, so several processes or
machines can train parts of one sweep, and what is there can be read at any time.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.core.files import write_atomically
from afina.errors import CheckpointError, ConfigError
from afina.training.recipe import Recipe, read_recipe

__all__ = ["Found", "Point", "best_of", "check_folder", "read_points", "recipe_of", "results_of", "write_points"]

SWEEP, FAILED = "sweep.json", "failed.txt"


@dataclass
class Point:
    """One combination of the values of the grid; `values` are as they were typed."""

    number: int
    values: dict[str, str]
    recipe: Recipe | None = None  # None: read from a folder, whose runs have their own

    def folder(self, sweep: Path, of: int = 99) -> Path:
        """The run folder of this point."""
        return sweep / f"{self.number:0{max(2, len(str(of)))}}"

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


@dataclass
class Found:
    """What a point has come to."""

    point: Point
    folder: Path
    state: str = "waiting"  # finished, failed, begun or waiting
    error: str = ""
    best_by: str = ""
    better: int = 1
    title: str = ""
    form: str = ".3f"
    validation: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def score(self) -> tuple[float, float]:
        """Validation's figure, more is better; among equals the lower loss."""
        value = self.validation.get(self.best_by)
        reading = -math.inf if value is None else self.better * value
        return reading, -self.validation.get("loss", math.inf)


def write_points(sweep: Path, points: Sequence[Point], about: Mapping[str, Any]) -> None:
    """Write `sweep.json`."""
    content = {**about, "points": [point.values for point in points], "recipe": _settings(points[0])}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    sweep.mkdir(parents=True, exist_ok=True)
    write_atomically(sweep / SWEEP, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_points(sweep: Path) -> list[Point]:
    """The points of a sweep's folder. Raises CheckpointError where it holds none."""
    try:
        content = json.loads((sweep / SWEEP).read_text(encoding="utf-8"))
        return [Point(i, dict(values)) for i, values in enumerate(content["points"], 1)]
    except FileNotFoundError:
        raise CheckpointError(f"{sweep} holds no {SWEEP}, so it is no folder of `afina sweep`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{sweep / SWEEP} cannot be read: {error}") from None


def check_folder(sweep: Path, points: Sequence[Point], *, resume: bool, part: bool = False) -> None:
    """Raise ConfigError where the folder is not for these points; a `part` may find what other parts have begun."""
    if sweep.is_file():
        raise ConfigError(f"--output {sweep} is a file; give a folder")
    if not sweep.is_dir() or not any(sweep.iterdir()):
        if resume and not part:
            raise ConfigError(f"--resume: {sweep} holds no sweep; leave --resume out to start one")
        return
    if not resume and not (part and (sweep / SWEEP).is_file()):
        cure = "to finish the sweep in it add --resume" if (sweep / SWEEP).is_file() else "take another folder"
        raise ConfigError(f"--output {sweep} exists and is not empty; {cure}")
    there = [point.values for point in read_points(sweep)]
    if there != [point.values for point in points]:
        raise ConfigError(
            f"{sweep} holds another sweep, of {len(there)} points, the first of them {Point(1, there[0])}; type the grid it "
            "was started with, or take another folder"
        )
    known, now = json.loads((sweep / SWEEP).read_text(encoding="utf-8")).get("recipe", {}), _settings(points[0])
    wrong = [f"{key} was {known[key]!r} and is {now[key]!r}" for key in known if key in now and known[key] != now[key]]
    if wrong:
        raise ConfigError(
            f"{sweep} holds a sweep of another recipe: {'; '.join(wrong)}. Type what it was started with, or take another "
            "folder"
        )


def _settings(point: Point) -> dict[str, Any]:
    """Every key of its recipe, as a file holds it: `training.epochs` and its value."""
    found: dict[str, Any] = {}
    parts = [("", dataclasses.asdict(recipe_of(point)))]
    for above, values in parts:
        for key, value in values.items():
            if isinstance(value, dict):
                parts.append((f"{above}{key}.", value))
            else:
                found[f"{above}{key}"] = value
    return found


def results_of(sweep: Path, points: Sequence[Point]) -> list[Found]:
    """What each point has come to, by its run folder."""
    made = []
    for point in points:
        folder = point.folder(sweep, len(points))
        found = Found(point, folder)
        made.append(found)
        if (folder / "metrics.json").is_file():
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            training = read_recipe(folder / "recipe.yaml").training
            found.state, found.best_by, found.seed = "finished", str(training.best), training.seed
            figure = metrics["figures"][found.best_by]
            found.better, found.title, found.form = figure["better"], figure["title"], figure["form"]
            found.validation, found.test, found.train = metrics["validation"], metrics["test"], metrics["train"]
        elif (folder / FAILED).is_file():
            found.state, found.error = "failed", (folder / FAILED).read_text(encoding="utf-8").strip()
        elif (folder / "checkpoints").is_dir():
            found.state = "begun"
    return made


def best_of(found: Sequence[Found]) -> Found | None:
    """The finished point that the validation rows like best; the test rows choose nothing."""
    finished = [one for one in found if one.state == "finished"]
    return max(finished, key=lambda one: one.score, default=None)


def recipe_of(point: Point) -> Recipe:
    """The recipe of a point that is to be trained."""
    if point.recipe is None:
        raise ConfigError(f"point {point.number} has no recipe; type the grid")
    return point.recipe
