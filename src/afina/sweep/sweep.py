"""A whole sweep: `check_points` finds everything that is wrong, `train_points` trains and writes.

Points whose runs can share a pass are trained together, the others one after another over the same base, rows and trunk.
Each point gets an ordinary run folder. A run that fails, because its learning rate was too high for example, ends nothing
but itself.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from afina.errors import AfinaError, ConfigError, DataError, MissingDependencyError, Problems, StoppedError
from afina.memory.heap import large_tensors_kept
from afina.report.words import counted
from afina.sweep.common import Common
from afina.sweep.groups import alike, alone_because, tried
from afina.sweep.joined import JoinedModel
from afina.sweep.points import FAILED, Point, recipe_of
from afina.sweep.together import train_together
from afina.training.run import prepare
from afina.training.running import Run

__all__ = ["Group", "check_points", "train_points"]


@dataclass
class Group:
    """Points whose runs may share a pass; `why` says why they do not."""

    points: list[Point] = field(default_factory=list)
    why: str = ""


def check_points(
    points: Sequence[Point], common: Common, spell: Callable[[str], str] = str
) -> tuple[list[Group], Run, list[str]]:
    """The points in groups, the first point's run to be shown, and what is to be told; nothing is trained or written.

    Raises ConfigError with what is wrong with any point, each problem once.
    """
    wrong: dict[str, list[Point]] = {}
    groups: dict[str, Group] = {}
    shown: Run | None = None
    tests, dropout = set[tuple[Any, ...]](), False
    for point in points:
        try:
            run = _prepared(point, None, common, spell)
        except (ConfigError, DataError, MissingDependencyError) as error:
            wrong.setdefault(str(error), []).append(point)
            continue
        why = alone_because(run)
        group = groups.setdefault(f"alone: {why}" if why else alike(run), Group(why=why or ""))
        group.points.append(point)
        shown = shown or run
        dropout = dropout or (not why and _drops(run))
        tests.add(tuple(example.line for example in run.rows["test"].examples))
    problems = Problems("the sweep")
    for text, of in wrong.items():
        rest = f" and {counted(len(of) - 1, 'more point')}" if len(of) > 1 else ""
        problems.add(f"point {of[0].number} ({of[0]}){rest}: {text}")
    problems.raise_as(ConfigError)
    assert shown is not None
    for group in groups.values():
        if not group.why and len(group.points) == 1:
            group.why = "no other point has the same base, task, method and frozen blocks"
    notes = []
    if len(tests) > 1:
        notes.append(
            f"the points divide the rows in {len(tests)} ways (the seed divides them too), so their scores are of different "
            "rows; compare points of one division, or means over all"
        )
    if dropout:
        notes.append("with dropout a run of a sweep draws other numbers than the run alone; without, both learn the same")
    return list(groups.values()), shown, notes


def train_points(
    sweep: Path,
    of: int,
    groups: Sequence[Group],
    common: Common,
    *,
    together: int | None = None,
    spell: Callable[[str], str] = str,
    say: Callable[[str], None] = lambda text: None,
    tell: Callable[[Point, dict[str, Any]], None] = lambda point, line: None,
    over: Callable[[Point, Any], None] = lambda point, result: None,
) -> None:
    """Train the points of the groups into the folder `sweep`, of `of` points in all.

    `say` gets sentences about what is done how, `tell` the lines of each run's log, `over` the metrics of each finished run,
    or its error. Raises StoppedError where Ctrl-C or SIGTERM came: what is finished stays, and the rest can be resumed.
    """

    def ended(point: Point, result: Any) -> None:
        if isinstance(result, StoppedError):
            return
        if isinstance(result, BaseException):
            if not isinstance(result, AfinaError | RuntimeError):
                raise result
            (point.folder(sweep, of) / FAILED).write_text(f"{result}\n", encoding="utf-8")
        over(point, result)

    for group in groups:
        size = len(group.points) if together is None else together
        waiting = list(group.points)
        while waiting and not group.why and size > 1 and len(waiting) > 1:
            runs = {f"p{point.number}": _begun(point, sweep, of, common, spell) for point in waiting[:size]}
            first = next(iter(runs.values()))
            bare = common.bare(first.model.get_base_model())
            memory, device = first.recipe.memory, first.model.device
            joined = JoinedModel(
                bare, {name: run.model for name, run in runs.items()}, device, first.task.tokenizer.pad_token_id,
                checkpointing=memory.gradient_checkpointing, roomy=memory.roomy(device.type),
            )  # fmt: skip
            with large_tensors_kept(memory.roomy(device.type)):  # as the runs will have it
                most = tried(runs, joined, together)
            if isinstance(most, str):
                group.why = most
                break
            if most < len(runs):
                size = most
                runs = {name: runs[name] for name in list(runs)[:most]}
            by_name = {f"p{point.number}": point for point in waiting[:most]}
            told = f"trained together with {counted(most - 1, 'other run')} of a sweep, in one pass a step"
            for run in runs.values():
                run.told = [told]
            say(f"{_numbers(list(by_name.values()))}: together, in one pass a step")
            notes = train_together(
                runs, joined, most, lambda name, result, by_name=by_name: ended(by_name[name], result),  # type: ignore[misc]
                lambda name, line, by_name=by_name: tell(by_name[name], line),  # type: ignore[misc]
            )  # fmt: skip
            for note in notes:
                say(f"{_numbers(list(by_name.values()))}: {note}")
            waiting = waiting[most:]
        if waiting:
            why = group.why or ("--together 1" if together == 1 else "no other is left to share a pass with")
            say(f"{_numbers(waiting)}: one after another ({why})")
        for point in waiting:
            run = _begun(point, sweep, of, common, spell)
            run.told = [f"trained by itself in a sweep: {group.why or 'as asked'}; base, rows and frozen trunk were shared"]
            try:
                result: Any = run.execute(lambda line, point=point: tell(point, line))  # type: ignore[misc]
            except StoppedError:
                raise
            except (AfinaError, RuntimeError) as error:
                result = error
            ended(point, result)


def _prepared(point: Point, output: Path | None, common: Common, spell: Callable[[str], str], **how: Any) -> Run:
    return prepare(copy.deepcopy(recipe_of(point)), output, spell=spell, shared=common, trial=output is None, **how)


def _begun(point: Point, sweep: Path, of: int, common: Common, spell: Callable[[str], str]) -> Run:
    """The run of a point, from its last checkpoint where there is one."""
    folder = point.folder(sweep, of)
    (folder / FAILED).unlink(missing_ok=True)
    resume = any((folder / "checkpoints").glob("step-*/state.json"))
    if not resume and folder.is_dir():
        shutil.rmtree(folder)  # ended before its first checkpoint
    return _prepared(point, folder, common, spell, resume=resume)


def _drops(run: Run) -> bool:
    """Whether something is drawn while it trains."""
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in run.model.modules())
    return drops or bool(run.recipe.method.get("lora_dropout"))


def _numbers(points: Sequence[Point]) -> str:
    """`points 1 to 4`, `point 7`."""
    numbers = [point.number for point in points]
    if len(numbers) == 1:
        return f"point {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"points {numbers[0]} to {numbers[-1]}"
    return f"points {', '.join(map(str, numbers))}"
