"""A finished run, loaded for answering: base, adapter and tokenizer from its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afina.errors import CheckpointError
from afina.model import PeftModel
from afina.tasks.sequence_classification import SequenceClassification
from afina.training.loop import make_accelerator, predict
from afina.training.models import find_model, load_tokenizer
from afina.training.recipe import Recipe, read_recipe

__all__ = ["TrainedRun"]


@dataclass
class TrainedRun:
    """What a run folder answers with."""

    folder: Path
    recipe: Recipe
    task: SequenceClassification
    model: PeftModel

    @classmethod
    def load(cls, folder: Path) -> TrainedRun:
        """Raises CheckpointError where the folder is no finished run."""
        if not folder.is_dir():
            raise CheckpointError(f"there is no run folder {folder}")
        missing = [name for name in ("recipe.yaml", "adapter", "metrics.json") if not (folder / name).exists()]
        if missing:
            here = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            stopped = (folder / "checkpoints").is_dir() and "recipe.yaml" not in missing
            again = "; this one stopped before the end, `afina train ... --resume` goes on" if stopped else ""
            raise CheckpointError(
                f"{folder} is no finished run: it lacks {', '.join(missing)} and holds {here}. Give the folder that was "
                f"--output of `afina train`{again}"
            )
        recipe = read_recipe(folder / "recipe.yaml")
        labels = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]["labels"]
        source = find_model(recipe.model)
        task = SequenceClassification(labels, load_tokenizer(source, folder / "adapter"))
        model = PeftModel.from_pretrained(task.load_model(source.path), folder / "adapter", tokenizer=task.tokenizer)
        return cls(folder, recipe, task, model)

    def probabilities(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Probabilities `[texts, classes]` of texts that are not empty, in float32."""
        accelerator = make_accelerator("fp32")
        length = self.recipe.training.max_length
        encoded = self.task.encode(texts, length, length or self.task.limit(self.model.get_base_model()))
        return predict(self.model.to(accelerator.device), self.task, encoded.ids, batch_size, accelerator, exact=True)
