"""A run that goes on from an adapter instead of a new one: `start` in a recipe.

The adapter's own configuration is that of the run, its tokenizer too, so that prompts stay as they were. A task that
measures the model against a reference keeps the adapter a second time, frozen: what it started from is the reference (T31).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.core.config import AdapterConfig
from afina.core.registry import method_for
from afina.errors import AfinaError, Problems, did_you_mean, shortened
from afina.model import PeftModel
from afina.tasks.reference import REFERENCE, without_dropout
from afina.tasks.task import Task
from afina.training.recipe import DEFAULT_MODEL, METHOD_DEFAULTS, Recipe, read_recipe

__all__ = ["Start", "find_start"]

_CONFIG = "adapter_config.json"


@dataclass
class Start:
    """An adapter's folder and configuration."""

    folder: Path
    config: Any

    @property
    def tokenizer(self) -> Path | None:
        """Where its tokenizer is; None where none was saved with it."""
        return self.folder if (self.folder / "tokenizer_config.json").is_file() else None

    def settled(self, recipe: Recipe, config: AdapterConfig, problems: Problems, spell: Callable[[str], str]) -> Any:
        """The adapter's configuration; adds what the recipe says otherwise to `problems`."""
        name = method_for(self.config).name
        asked = {k: v for k, v in recipe.method.items() if k != "name"}
        if recipe.method["name"] != name:
            problems.add(f"{spell('method.name')}={recipe.method['name']}: {recipe.start} is a {name} adapter; leave it out")
        else:
            for key, value in asked.items():
                own, given = getattr(self.config, key), getattr(config, key)
                if _plain(own) != _plain(given) and value != METHOD_DEFAULTS.get(name, {}).get(key):
                    asked_as = f"{spell(f'method.{key}')}={value}"
                    problems.add(f"{asked_as}: {recipe.start} was made with {_plain(own)}; leave it out")
        if self.config.task_type and config.task_type != self.config.task_type:
            problems.add(
                f"{spell('start')} {recipe.start}: the adapter is of a {self.config.task_type} model, and "
                f"{recipe.task['name']} trains a {config.task_type} model"
            )
        return self.config

    def model(self, base: Any, task: Task) -> PeftModel:
        """The base with the adapter, to be trained, and where the task compares, with it once more, frozen."""
        model = PeftModel.from_pretrained(base, self.folder, is_trainable=True, config=self.config, tokenizer=task.tokenizer)
        if task.compares:
            model.load_adapter(self.folder, REFERENCE)
            for adapter in model.adapters.adapters(REFERENCE):
                without_dropout(adapter)
        return model


def find_start(recipe: Recipe, problems: Problems, spell: Callable[[str], str] = str) -> Start | None:
    """The adapter that a recipe starts from, None where it begins with a new one; the recipe's model and method become the
    adapter's where it names none. What is wrong is added to `problems`."""
    if recipe.start is None:
        return None
    folder = Path(recipe.start).expanduser()
    asked = f"{spell('start')} {recipe.start}"
    run = folder if (folder / "recipe.yaml").is_file() else None
    folder = folder if (folder / _CONFIG).is_file() else folder / "adapter"
    if not (folder / _CONFIG).is_file():
        above = Path(recipe.start).expanduser()
        if above.is_dir():
            held = shortened(sorted(p.name for p in above.iterdir())) or "nothing"
            problems.add(f"{asked}: expected a finished run or an adapter folder; it holds {held}")
        else:
            near = did_you_mean(above.name, [p.name for p in above.parent.iterdir()]) if above.parent.is_dir() else ""
            problems.add(f"{asked}: there is no such folder.{near}")
        return None
    try:
        config: Any = AdapterConfig.from_pretrained(folder)
        base = read_recipe(run / "recipe.yaml").model if run is not None else None
    except AfinaError as error:
        problems.add(f"{asked}: {error}")
        return None
    config.inference_mode = False
    if recipe.model == DEFAULT_MODEL:
        recipe.model = base or config.base_model_name_or_path or recipe.model
    if recipe.method == {"name": "lora"}:
        recipe.method = {"name": method_for(config).name}
    return Start(folder, config)


def _plain(value: Any) -> Any:
    """Sets and tuples as lists, in order, so that two ways of saying the same compare as equal."""
    return sorted(map(str, value)) if isinstance(value, set | tuple | list) else value
