"""The recipe that a file, options and `key=value` on the command line make together."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from afina.errors import Problems, did_you_mean

if TYPE_CHECKING:
    from afina.training.recipe import Recipe

__all__ = ["PLACES", "assemble", "method_options", "section_options", "typed_as", "typed_in"]

# option -> where the recipe keeps it
PLACES = {
    "data": "data.file", "text": "data.text", "image": "data.image", "audio": "data.audio",
    "text_pair": "data.text_pair", "label": "data.label", "model": "model", "start": "start", "reward": "task.reward",
    "method": "method.name", "task": "task.name",
    "epochs": "training.epochs", "batch_size": "training.batch_size", "learning_rate": "training.learning_rate",
    "max_length": "training.max_length", "max_truncated": "training.max_truncated", "precision": "training.precision",
    "gradient_accumulation": "training.gradient_accumulation", "seed": "training.seed",
    "memory": "memory.limit", "weights": "memory.weights", "engine": "distributed.engine",
}  # fmt: skip
TYPED = {place: f"--{option.replace('_', '-')}" for option, place in PLACES.items()} | {"output": "--output"}


def typed_as(place: str) -> str:
    """How a key of the recipe is typed on the command line."""
    return TYPED.get(place, place)


def typed_in(command: Callable[..., Any]) -> Callable[[str], str]:
    """The same for a command that has some of the options alone; the other keys are typed to it as KEY=VALUE."""
    own = set(inspect.signature(command).parameters)
    return lambda place: typed_as(place) if TYPED.get(place, "")[2:].replace("-", "_") in own else place


def method_options(typed: Sequence[str], config: Any, name: str, problems: Problems) -> dict[str, Any]:
    """Options of a method's configuration class; adds every one that is unknown or of the wrong type to `problems`."""
    from afina.training.recipe import LISTS, NOT_IN_RECIPES, parse_value

    hints = typing.get_type_hints(config)
    known = {f.name for f in dataclasses.fields(config)} - NOT_IN_RECIPES
    values: dict[str, Any] = {}
    for word in typed:
        key, equals, text = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            problems.add(f"{word!r} is not understood; options of the method are written key=value, for example r=16")
        elif key not in known:
            problems.add(f"{key!r} is no option of {name}.{did_you_mean(key, known)} See `afina methods {name}`.")
        elif key in values:
            problems.add(f"{key} is given twice")
        else:
            try:
                values[key] = parse_value(text.strip(), hints[key], several=key in LISTS)
            except ValueError as error:
                problems.add(f"{word}: {error}")
    return values


def assemble(given: dict[str, Any], arguments: list[str], problems: Problems) -> Recipe:
    """The recipe that a file and the options typed over it make; what cannot be understood is added to `problems`."""
    from afina.core.registry import methods
    from afina.training.recipe import Recipe, parse_value, read_recipe

    files = [a for a in arguments if a.endswith((".yaml", ".yml")) and "=" not in a]
    if len(files) > 1:
        problems.add(f"one recipe at a time: {', '.join(files)}")
    recipe = read_recipe(Path(files[0])) if files else Recipe()
    for name, value in given.items():
        section, _, key = PLACES[name].rpartition(".")
        if name in ("model", "method", "task", "start"):
            name_whole(recipe, name, value)
        elif section == "task":
            recipe.task[key] = value  # of the task that is named before
        else:
            target = getattr(recipe, section)
            hint = get_type_hints(type(target))[key]
            setattr(target, key, parse_value(value, hint) if hint == int | str else value)
    words = [a for a in arguments if a not in files]
    words = section_options(words, recipe, problems)
    for word in [word for word in words if "=" not in word and Path(word).exists()]:
        problems.add(f"{word!r} is not understood; a file or folder of rows is given as data.file={word}")
        words.remove(word)
    chosen = methods().get(str(recipe.method["name"]))
    if chosen is not None:  # else its name is a problem that the recipe's own check tells
        recipe.method.update(method_options(words, chosen.config, chosen.name, problems))
    return recipe


def name_whole(recipe: Recipe, key: str, name: str) -> None:
    """Another model, method or task; a method or task of another name loses the options that the recipe gives it."""
    if key in ("model", "start"):
        setattr(recipe, key, name)
    elif name != getattr(recipe, key).get("name"):
        setattr(recipe, key, {"name": name})


def section_options(words: list[str], recipe: Recipe, problems: Problems) -> list[str]:
    """Put every key of the recipe (`model=NAME`, `training.KEY=VALUE`, ...) into it; returns options of the method."""
    from afina.tasks.catalogue import tasks
    from afina.training.recipe import parse_value

    others = []
    for word in words:
        place, equals, text = word.partition("=")
        section, _, rest = place.strip().replace("-", "_").partition(".")
        if equals and not rest and section in ("model", "method", "task", "start"):
            name_whole(recipe, section, text.strip())
            continue
        if equals and rest and section == "method":
            others.append(f"{rest}={text}")
            continue
        if section not in ("training", "data", "task", "memory", "distributed") or not equals or not rest:
            others.append(word)
            continue
        chosen = tasks().get(str(recipe.task.get("name")))
        if section == "task" and chosen is None:
            continue  # the task's name is a problem that the recipe's own check tells
        target: Any = chosen.Options if section == "task" and chosen else getattr(recipe, section)
        *above, key = rest.split(".")
        for name in above:
            target = getattr(target, name, None)
        hints = get_type_hints(target if isinstance(target, type) else type(target)) if target is not None else {}
        if key not in hints:
            problems.add(f"{place!r} is no key of a recipe.{did_you_mean(key, hints)}")
            continue
        try:
            value = parse_value(text.strip(), hints[key])
        except ValueError as error:
            problems.add(f"{word}: {error}")
            continue
        if section == "task":
            recipe.task[key] = value
        else:
            setattr(target, key, value)
    return others
