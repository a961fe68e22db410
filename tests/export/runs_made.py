"""Small finished runs to export: one of every task, and language models whose tokenizers are of real kinds."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))

import language_bases
from every_task import CASES, case

from afina.export.exporting import export
from afina.export.format import Settings
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare

__all__ = ["ANYTHING", "CASES", "case", "exported", "finished", "language_run", "task_run"]

STORIES = Path(__file__).parents[2].parent / "shared" / "data" / "models" / "stories260K-llama"
ANYTHING = 1.0  # as max_drop: models trained for a second have figures that mean nothing


def finished(recipe, folder):
    """Train a recipe; the folder of its run."""
    if not (folder / "metrics.json").is_file():
        prepare(recipe, folder, overwrite=True).execute()
    return folder


def task_run(name, folder, **changes):
    """A run of a task on its tiny base."""
    recipe = case(name, folder, epochs=3, learning_rate=2e-2)
    for key, value in changes.items():
        setattr(recipe, key, value)
    return finished(recipe, folder / "run")


def language_run(architecture, folder, rows=37, **method):
    """A run of instructions on a tiny language model, or on a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = architecture if isinstance(architecture, Path) else folder / "base"
    if not isinstance(architecture, Path):
        language_bases.save(base, architecture)
    chance = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(rows):
            words = chance.choice(language_bases.SENTENCES).split()
            chance.shuffle(words)
            row = {"prompt": " ".join(words[:13]), "completion": f"{' '.join(words[:2])}{chance.choice(['!', ' é'])}"}
            file.write(json.dumps(row) + "\n")
    recipe = Recipe(
        task={"name": "causal_lm"},
        model=str(base),
        data=DataOptions(file=str(folder / "rows.jsonl")),
        method={"name": "lora", "r": 3, "target_modules": "all-linear", **method},
        training=TrainingOptions(epochs=3, batch_size=5, learning_rate=1e-2, precision="fp32", max_truncated=0.9),
    )
    return finished(recipe, folder / "run")


def exported(run, name, output, **settings):
    """An export, whatever its figures."""
    return export(run, name, output, Settings(**{"max_drop": ANYTHING, **settings}))
