"""A planner of memory from a recipe alone, or from what is known of a run already.

Where there is no data file, rows of `training.max_length` tokens stand for it, and where there is no tokenizer, one that
knows a single word.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from afina.data.columns import chosen_columns
from afina.data.divide import divided as divide_rows
from afina.data.example import Example
from afina.errors import ConfigError, Problems
from afina.memory.measure import resident
from afina.memory.storage import Storage, settled_weights
from afina.tasks.catalogue import find_task, tasks
from afina.tasks.other_files import rows_of
from afina.tasks.task import Feature, Task, length_of
from afina.training.cache import encoded_once
from afina.training.models import ModelSource, find_model, load_config, load_processor, load_tokenizer
from afina.training.planner import Planner
from afina.training.precision import choose_precision
from afina.training.recipe import Recipe
from afina.training.rows_for_plans import one_word_tokenizer, rows_of_words
from afina.training.start import find_start
from afina.training.vocabulary import add_tokens

__all__ = ["planner_for", "planner_of"]

_PROCESS = 500_000_000  # bytes of Python with its libraries


def planner_for(
    recipe: Recipe, device: str, *, processes: int | None = None, spell: Callable[[str], str] = str,
    problems: Problems | None = None,
) -> Planner:  # fmt: skip
    """A planner from a recipe alone; the recipe's open settings (weights, batch) are resolved in place.

    Raises ConfigError with all that is wrong in the options, DataError with what is wrong in the file.
    """
    problems = problems or Problems("the recipe")
    start = find_start(recipe, problems, spell)
    config = recipe.check(problems, spell)
    if start is not None and config is not None:
        config = start.settled(recipe, config, problems, spell)
    source = None
    try:
        chosen = tasks().get(str(recipe.task["name"]))
        source = find_model(recipe.model, pipeline=chosen is not None and chosen.pipelines)
        load_config(source)
    except ConfigError as error:
        problems.add(f"{spell('model')}: {error}")
    has_file = bool(recipe.data.file) and (Path(recipe.data.file).exists() or recipe.training.max_length is None)
    files = recipe.task["name"] in tasks() and find_task(recipe.task["name"]).reads_files
    if files:
        has_file = has_file and Path(recipe.data.file).exists()
    elif not has_file and recipe.training.max_length is None:
        problems.add(
            f"{spell('training.max_length')} is missing: without {spell('data.file')} the length of the rows has to be said"
        )
    problems.raise_as(ConfigError)
    assert source is not None
    made = find_task(recipe.task["name"]).for_base(load_config(source))
    options = made.Options(**{k: v for k, v in recipe.task.items() if k != "name"})
    notes: list[str] = []
    processor = load_processor(source, made.processor_kind) if files else _tokenizer(source)
    if processor is None:
        processor = one_word_tokenizer(load_config(source))
        notes.append("there is no tokenizer beside the configuration, so every row is taken to have the full length")
        has_file = False
        if recipe.training.max_length is None:
            raise ConfigError(f"{spell('training.max_length')} is missing: without a tokenizer rows cannot be measured")
    tokenizer = processor if made.processor_kind == "tokenizer" else getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        add_tokens(tokenizer, recipe.data.new_tokens)
    if has_file:
        kind = made.kind_for(recipe.task)
        table = rows_of(recipe.data, kind, spell)
        columns = chosen_columns(table, kind, recipe.data, problems, spell)
        problems.raise_as(ConfigError)
        done = divide_rows(table, kind, recipe.data, columns=columns, seed=recipe.training.seed)
        sides = {name: [done.examples[i] for i in rows] for name, rows in done.sides.items()}
    elif (rows := made.stand_ins(options)) is not None:
        sides = {name: list(rows) for name in ("train", "validation", "test")}
        of_classes = f", with {len(rows)} classes" if made.kind.labels in ("class", "classes") else ""
        notes.append(f"no data file was read: every row is taken to be as large as they come{of_classes}")
    else:
        assert recipe.training.max_length is not None
        sides = {name: rows_of_words(made, options, recipe.training.max_length) for name in ("train", "validation", "test")}
        notes.append(
            f"no data file was read: every row is taken to have {recipe.training.max_length} tokens"
            + (", with 2 classes" if made.kind.labels in ("class", "classes") else "")
        )
    learned = made.learn(sides["train"], [*sides["validation"], *sides["test"]])
    task = made(processor, options, learned)
    if device == "cpu":
        precision = choose_precision(recipe.training.precision, torch.device("cpu"))
    else:
        precision = "bf16" if recipe.training.precision == "auto" else recipe.training.precision
        if recipe.training.precision == "auto":
            notes.append("the GPU is taken to compute in bf16 (training.precision: auto)")
    recipe.memory.weights = settled_weights(recipe.memory.weights, load_config(source), precision)
    return planner_of(recipe, task, source, config, sides, device, precision, processes=processes, notes=notes)


def planner_of(
    recipe: Recipe, task: Task, source: ModelSource, config: Any, sides: Mapping[str, list[Example]], device: str,
    precision: str, *, processes: int | None = None, notes: Sequence[str] = (),
) -> Planner:  # fmt: skip
    """A planner of what is known already: the task, the method's configuration, the examples of each side.

    `notes` say for what the examples stand; with none they are those of a file.
    """
    outline = copy.copy(task)
    outline.storage = Storage("fp32", empty=True)
    base = outline.load_model(source.path)
    task.learned |= outline.learned
    limit = task.limit(base) - int(getattr(config, "num_virtual_tokens", None) or 0)
    if recipe.training.max_length is not None and recipe.training.max_length > limit:
        raise ConfigError(f"training.max_length={recipe.training.max_length}: {recipe.model} takes at most {limit} tokens")
    everything = [e for examples in sides.values() for e in examples]
    encode = outline.encode if notes else partial(encoded_once, outline)  # which needs no weights
    made = encode(everything, recipe.training.max_length, limit).features
    largest = "validation" if len(sides["validation"]) > len(sides["test"]) else "test"
    ends = dict(zip(sides, accumulate(len(examples) for examples in sides.values()), strict=True))
    features: dict[str, Sequence[Feature]] = {}
    for name, side in (("train", "train"), ("evaluate", largest)):
        first = ends[side] - len(sides[side])
        own = [f for f in made if first <= f["row"] < ends[side]]
        own = sorted(own, key=length_of, reverse=True)
        most = max(recipe.training.at_once(length_of(own[0]), 1), recipe.training.read_at_once)
        features[name] = own[:most]
        if notes:  # as many as are asked for
            features[name] = [own[i % len(own)] for i in range(most)]
    said = list(notes)
    if not notes:
        longest = max(length_of(f) for f in (*features["train"], *features["evaluate"]))
        if longest > 1:
            said.append(f"planned with the longest rows of the file: {longest} {task.unit}")
    count = processes if processes is not None else int(os.environ.get("WORLD_SIZE", "1"))
    process = resident() if count == 1 else _PROCESS  # the same in each, so that all choose the same
    twice = recipe.start is not None and task.compares
    tokens = None if notes else sum(length_of(f) for f in made if f["row"] < ends["validation"])
    return Planner(task, source, config, features, device, precision, count, said, twice, process, tokens)


def _tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer; None where there is only a configuration."""
    folder = Path(source.path)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("*vocab*")):
        return None
    try:
        return load_tokenizer(source)
    except ConfigError:
        if folder.is_dir():
            raise
        return None
