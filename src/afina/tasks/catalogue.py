"""The tasks there are: every file of this package that defines one is found."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import afina.tasks
from afina.core.config import check_limits
from afina.errors import ConfigError, Problems, did_you_mean
from afina.tasks.task import Task

__all__ = ["find_task", "task_from_settings", "task_options", "tasks"]


@cache
def tasks() -> dict[str, type[Task]]:
    """Tasks by name."""
    for module in pkgutil.iter_modules(afina.tasks.__path__):
        importlib.import_module(f"afina.tasks.{module.name}")
    found: dict[str, type[Task]] = {}
    waiting = list(Task.__subclasses__())
    while waiting:
        task = waiting.pop()
        waiting += task.__subclasses__()
        if task.__dict__.get("name"):
            found[task.name] = task
    return dict(sorted(found.items()))


def find_task(name: str) -> type[Task]:
    """The task of that name; raises ConfigError with the nearest names."""
    if name not in tasks():
        raise ConfigError(f"{name!r} is no task.{did_you_mean(name, tasks())}")
    return tasks()[name]


def task_options(task: type[Task], given: Mapping[str, Any], problems: Problems, spell: Callable[[str], str] = str) -> Any:
    """The options of a task from what a recipe says; adds what is wrong to `problems`."""
    fields = {f.name for f in dataclasses.fields(task.Options)}
    for key in sorted(set(given) - fields):
        near = did_you_mean(key, fields) if fields else " It has no options."
        problems.add(f"{spell(f'task.{key}')} is no option of {task.name}.{near}")
    options = task.Options(**{key: value for key, value in given.items() if key in fields})
    check_limits(options, problems, lambda name: spell(f"task.{name}"))
    return options


def task_from_settings(settings: Mapping[str, Any], processor: Any, config: Any = None) -> Task:
    """The task that `Task.settings` came from; `config` is that of the base, which some tasks ask for their way."""
    learned = dict(settings)
    task = find_task(learned.pop("name")).for_base(config)
    return task(processor, task.Options(**learned.pop("options")), learned)
