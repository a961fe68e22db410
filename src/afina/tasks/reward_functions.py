"""What says how good a written answer is: functions of Python files, and rankers that the task `reward` has trained.

`task.reward` names one or several, with commas between them, whose rewards are summed:

    rewards.py:mentions_a_dog     def mentions_a_dog(completions, prompts): return ["dog" in text for text in completions]
    runs/ranker                   a run of the task reward

A function is given what it names among `completions` and `prompts` (texts), `labels` (the label column) and `messages` (the
prompts as messages), each a list with an entry for every completion, and returns a list of as many numbers.
"""

from __future__ import annotations

import inspect
import math
import runpy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from afina.data.example import Example
from afina.errors import AfinaError, ConfigError, Problems, TrainingError, did_you_mean
from afina.tasks.preferences import Asked

__all__ = ["Rewards", "Told", "find_rewards"]

_GIVEN = ("completions", "prompts", "labels", "messages")
_AT_ONCE = 32  # answers that a ranker reads at once
_EXAMPLE = "for example --reward rewards.py:mentions_a_dog, or a run of the task reward"


@dataclass(frozen=True)
class Told:
    """What a reward is told of a prompt."""

    prompt: str
    label: str
    messages: tuple[Any, ...]


@dataclass
class Rewards:
    """Rewards by the name they were asked for under; their sum is what counts."""

    named: dict[str, Callable[[Sequence[Told], Sequence[str], torch.device], list[float]]]

    def __call__(self, told: Sequence[Told], completions: Sequence[str], device: torch.device) -> list[float]:
        """The reward of each completion; raises TrainingError where one cannot be had."""
        each = [reward(told, completions, device) for reward in self.named.values()]
        return [math.fsum(values) for values in zip(*each, strict=True)]


def find_rewards(asked: str, spelled: str = "task.reward") -> Rewards:
    """The rewards that `task.reward` names. Raises ConfigError with all that is wrong with them."""
    problems, named = Problems("rewards"), dict[str, Any]()
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names:
        problems.add(f"{spelled} is missing: what says how good an answer is, {_EXAMPLE}")
    for name in names:
        try:
            named[name] = _ranker(name) if Path(name).is_dir() else _function(name)
        except AfinaError as error:
            problems.add(f"{spelled} {name}: {error}")
    problems.raise_as(ConfigError)
    return Rewards(named)


# --- functions


def _function(name: str) -> Callable[[Sequence[Told], Sequence[str], torch.device], list[float]]:
    place, colon, wanted = name.rpartition(":")
    if not colon or not place.endswith(".py"):
        raise ConfigError(f"expected FILE.py:function or the folder of a run, {_EXAMPLE}")
    path = Path(place).expanduser()
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise ConfigError(f"there is no file {place}.{near} Paths are read from the folder the command runs in")
    try:
        found = runpy.run_path(str(path))
    except Exception as error:
        raise ConfigError(f"{place} cannot be run: {_told(error, path)}") from error
    function = found.get(wanted)
    if not callable(function):
        there = [n for n, value in found.items() if inspect.isfunction(value) and not n.startswith("_")]
        raise ConfigError(f"{place} defines no function {wanted!r}.{did_you_mean(wanted, there) if there else ''}")
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)
    unknown = [p.name for p in parameters if p.name not in _GIVEN and p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    if unknown or not (takes_all or any(p.name == "completions" for p in parameters)):
        raise ConfigError(
            f"{wanted}{inspect.signature(function)} cannot be called; name its arguments among {', '.join(_GIVEN)}, for "
            f"example def {wanted}(completions, prompts)"
        )
    taken = [given for given in _GIVEN if takes_all or any(p.name == given for p in parameters)]

    def reward(told: Sequence[Told], completions: Sequence[str], device: torch.device) -> list[float]:
        given = {"completions": list(completions), "prompts": [t.prompt for t in told], "labels": [t.label for t in told],
                 "messages": [[dict(m) for m in t.messages] for t in told]}  # fmt: skip
        try:
            made = function(**{key: given[key] for key in taken})
        except Exception as error:
            first = f"; the first of its {len(completions)} completions is {completions[0][:80]!r}"
            raise TrainingError(f"task.reward {name} failed: {_told(error, path)}{first}") from error
        return _checked(made, name, completions)

    return reward


def _told(error: BaseException, path: Path) -> str:
    """The error, with the line of the user's file that it came from."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError in line {error.lineno}: {error.msg}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    return f"{type(error).__name__}: {error}" + (f" ({path.name}, line {lines[-1]})" if lines else "")


def _checked(made: Any, name: str, completions: Sequence[str]) -> list[float]:
    try:
        values = [float(value) for value in made]
    except (TypeError, ValueError):
        raise TrainingError(
            f"task.reward {name} returned {repr(made)[:80]}; expected a list of {len(completions)} numbers, one for each "
            "completion"
        ) from None
    if len(values) != len(completions):
        raise TrainingError(f"task.reward {name} returned {len(values)} rewards for {len(completions)} completions")
    for value, text in zip(values, completions, strict=True):
        if not math.isfinite(value):
            raise TrainingError(f"task.reward {name} returned {value} for the completion {text[:80]!r}; expected a number")
    return values


# --- rankers


def _ranker(name: str) -> Callable[[Sequence[Told], Sequence[str], torch.device], list[float]]:
    from afina.training.trained import TrainedRun  # a finished run is loaded from above, and only where one is named

    _, task, _ = TrainedRun.described(Path(name))
    if task.name != "reward":
        raise ConfigError(f"this run is of the task {task.name}; expected one of the task reward, which learns from pairs")
    loaded: list[Any] = []

    @torch.no_grad()
    def reward(told: Sequence[Told], completions: Sequence[str], device: torch.device) -> list[float]:
        if not loaded:
            loaded.append(TrainedRun.load(Path(name)))
        run = loaded[0]
        model, task = run.model.to(device).eval(), run.task
        limit = task.limit(model.get_base_model())
        length = min(run.recipe.training.max_length or limit, limit)
        made = list[float]()
        for start in range(0, len(completions), _AT_ONCE):
            some = zip(told[start : start + _AT_ONCE], completions[start : start + _AT_ONCE], strict=True)
            examples = [Example(t.prompt, "", 0, Asked(t.messages, (text or " ",))) for t, text in some]
            batch = task.collate(task.encode(examples, length, limit).features)
            with torch.autocast(device.type, enabled=False):
                made += [answer[0] for answer in task.answers(model, {k: v.to(device) for k, v in batch.items()})]
        return _checked(made, name, completions)

    return reward
