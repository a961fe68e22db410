"""The cheapest settings with which a run fits into a limit of memory: `within_limit`.

They are tried in the order of what they cost: a step in more parts and fewer rows read at once (no result changes), blocks
computed again (a third more time), an 8-bit optimizer, 16-bit weights, int8, nf4, weights in the host's memory. Each is
added to those before it until a single row at once fits; then those that turned out not to be needed are taken back, and
as many rows are computed at once as fit.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from afina.errors import ConfigError
from afina.memory.footprint import Footprint, titled
from afina.memory.sizes import parse_size, shown_size
from afina.memory.storage import FLOATS
from afina.training.planner import Planner
from afina.training.recipe import Recipe

__all__ = ["HEADROOM", "Choice", "Tried", "settle", "within_limit"]

HEADROOM = 0.1  # of the limit, left free: plans are right within a tenth


@dataclass
class Tried:
    """One try: what was added to the settings before it, rows computed and read at once, what that takes."""

    added: str
    rows: int
    read: int
    footprint: Footprint
    fits: bool


@dataclass
class Choice:
    """The settings that were chosen, as a recipe; where nothing fits, those that take least."""

    recipe: Recipe
    footprint: Footprint
    limit: int
    fits: bool
    tried: list[Tried] = field(default_factory=list)
    changed: dict[str, Any] = field(default_factory=dict)  # keys of the recipe that are others now

    def reason(self) -> str:
        """Why nothing fits: the smallest figure, and what keeps it there."""
        parts = self.footprint.moments[self.footprint.decisive].device
        largest = sorted(parts.items(), key=lambda item: -item[1])[:2]
        said = " and ".join(f"{titled(name)} ({shown_size(size)})" for name, size in largest)
        return (
            f"nothing fits into {shown_size(self.limit)} with a tenth of it left free: the least is "
            f"{shown_size(self.footprint.total)} for one row at a time, most of it {said}. Shorter rows "
            "(training.max_length), a smaller model or a larger limit would help"
        )


@dataclass(frozen=True)
class Rung:
    """A setting that makes a run smaller: what it is called, where it is possible, what it changes."""

    title: str
    possible: Callable[[Recipe, Planner], bool]
    apply: Callable[[Recipe, Planner], None]
    library: str = ""


def _set(section: str, **values: Any) -> Callable[[Recipe, Planner], None]:
    def apply(recipe: Recipe, planner: Planner) -> None:
        for key, value in values.items():
            setattr(getattr(recipe, section), key, value)

    return apply


def _sixteen(recipe: Recipe, planner: Planner) -> None:
    recipe.memory.weights = planner.precision if planner.precision != "fp32" else "bf16"


def _offload(recipe: Recipe, planner: Planner) -> None:
    recipe.distributed.engine, recipe.distributed.offload = "zero3", True
    recipe.training.optimizer = "adamw" if "8bit" in recipe.training.optimizer else recipe.training.optimizer
    if recipe.memory.weights not in FLOATS:
        _sixteen(recipe, planner)


def _quantisable(recipe: Recipe, planner: Planner) -> bool:
    apart = recipe.distributed.engine in ("ddp", "zero2")
    return recipe.memory.weights in FLOATS and apart and not planner.task.pipelines


_RUNGS = (
    Rung(
        "blocks computed again",
        lambda recipe, planner: not recipe.memory.gradient_checkpointing,
        _set("memory", gradient_checkpointing=True),
    ),
    Rung(
        "8-bit optimizer",
        lambda recipe, planner: recipe.training.optimizer == "adamw" and recipe.distributed.engine == "ddp",
        _set("training", optimizer="adamw_8bit"),
        "bitsandbytes",
    ),
    Rung(
        "16-bit weights",
        lambda recipe, planner: recipe.memory.weights == "fp32" and planner.precision != "fp32",
        _sixteen,
    ),
    Rung("int8 weights", _quantisable, _set("memory", weights="int8"), "bitsandbytes"),
    Rung(
        "nf4 weights",
        lambda recipe, planner: _quantisable(recipe, planner) or recipe.memory.weights == "int8",
        _set("memory", weights="nf4"),
        "bitsandbytes",
    ),
    Rung(
        "weights in the host's memory",
        lambda recipe, planner: planner.device == "cuda" and not recipe.distributed.offload and not planner.task.pipelines,
        _offload,
        "deepspeed",
    ),
)


def within_limit(planner: Planner, recipe: Recipe, *, installed: bool = False) -> Choice:
    """The cheapest settings that fit into `recipe.memory.limit`; `recipe` stays as it is.

    `installed` leaves out what needs a library that is not there. Raises ConfigError for a limit that is no amount.
    """
    assert recipe.memory.limit is not None
    limit = parse_size(recipe.memory.limit)
    search = _Search(planner, recipe, limit, int(limit * (1 - HEADROOM)))
    return search.run([rung for rung in _RUNGS if not (installed and _lacking(rung.library))])


def settle(planner: Planner, recipe: Recipe, spell: Callable[[str], str] = str) -> Choice:
    """Puts the cheapest settings that fit into `recipe`; parts that are to be measured (`auto`) stay so.

    Raises ConfigError where nothing fits.
    """
    choice = within_limit(planner, recipe, installed=True)
    if not choice.fits:
        raise ConfigError(f"{spell('memory.limit')}={recipe.memory.limit}: {choice.reason()}")
    if recipe.training.gradient_accumulation == "auto":
        for key in ("training.gradient_accumulation", "training.evaluation_batch_size"):
            choice.changed.pop(key, None)
    for place, value in choice.changed.items():
        section, _, key = place.partition(".")
        setattr(getattr(recipe, section), key, value)
    return choice


def _lacking(library: str) -> bool:
    return bool(library) and importlib.util.find_spec(library) is None


@dataclass
class _Search:
    planner: Planner
    recipe: Recipe
    limit: int
    budget: int
    tried: list[Tried] = field(default_factory=list)
    least: int = 1  # parts of a step that the recipe asks for itself

    def run(self, rungs: Sequence[Rung]) -> Choice:
        start = copy.deepcopy(self.recipe)
        asked = start.training.gradient_accumulation
        self.least = asked if isinstance(asked, int) else 1
        start.training.gradient_accumulation = self.least
        start.training.evaluation_batch_size = start.training.read_at_once
        whole = self.planner.plan(start)
        if self._note("as the recipe says", start, whole):
            return self._chosen(start, whole)
        added: list[Rung] = []
        small = self._small(start)
        found = self.planner.plan(small)
        fits = self._note("one row at a time", small, found)
        for rung in rungs:
            if fits:
                break
            if not rung.possible(small, self.planner):
                continue
            next_one = copy.deepcopy(small)
            rung.apply(next_one, self.planner)
            try:
                footprint = self.planner.plan(next_one)
            except ConfigError:  # this model or method cannot
                continue
            fits = self._note(f"+ {rung.title}", next_one, footprint)
            if footprint.total < found.total:
                small, found = next_one, footprint
                added.append(rung)
        if not fits:
            return self._chosen(small, found, fits=False)
        for rung in added[:-1]:
            without = self._with(start, [r for r in added if r is not rung])
            footprint = self.planner.plan(without)
            if footprint.total <= self.budget:
                self._note(f"without {rung.title}", without, footprint)
                added.remove(rung)
        small = self._with(start, added)
        return self._grown(start, small, self.planner.plan(small), tried=not added)

    def _with(self, start: Recipe, rungs: Sequence[Rung]) -> Recipe:
        made = self._small(start)
        for rung in rungs:
            rung.apply(made, self.planner)
        return made

    def _small(self, recipe: Recipe) -> Recipe:
        made = copy.deepcopy(recipe)
        made.training.gradient_accumulation = self._share(recipe)
        made.training.evaluation_batch_size = 1
        return made

    def _share(self, recipe: Recipe) -> int:
        planner = self.planner
        return max(self.least, recipe.training.parts_for(1, planner.longest, planner.processes))

    def _grown(self, start: Recipe, small: Recipe, one: Footprint, *, tried: bool) -> Choice:
        """As many rows at once as fit, and as many read; `tried` where the whole step was."""
        share = self._share(start)
        for parts in self._parts(share):
            if tried and parts == self.least:
                continue
            wider = copy.deepcopy(small)
            wider.training.gradient_accumulation = parts
            wider.training.evaluation_batch_size = min(start.training.read_at_once, 2 * math.ceil(share / parts))
            found = self.planner.plan(wider)
            fits = self._note(f"a step in {parts} part{'s' if parts > 1 else ''}", wider, found)
            if fits:
                return self._chosen(wider, found)
        return self._chosen(small, one)

    def _parts(self, share: int) -> Iterator[int]:
        """Numbers of parts to try, from the fewest: the recipe's own and twice as many each time, short of single rows."""
        parts = self.least
        while parts < share:
            yield parts
            parts *= 2

    def _note(self, added: str, recipe: Recipe, footprint: Footprint) -> bool:
        parts, fits = recipe.training.gradient_accumulation, footprint.total <= self.budget
        assert isinstance(parts, int)
        rows = recipe.training.at_once(self.planner.longest, self.planner.processes * parts)
        self.tried.append(Tried(added, rows, recipe.training.read_at_once, footprint, fits))
        return fits

    def _chosen(self, recipe: Recipe, footprint: Footprint, *, fits: bool = True) -> Choice:
        changed: dict[str, Any] = {}
        for section in ("training", "memory", "distributed"):
            before, after = getattr(self.recipe, section), getattr(recipe, section)
            changed |= {f"{section}.{k}": v for k, v in vars(after).items() if getattr(before, k) != v}
        return Choice(recipe, footprint, self.limit, fits, self.tried, changed)
