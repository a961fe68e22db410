"""`prepare`: from a recipe to everything that is ready to be trained.

All that can be known before is found out and checked, and told together; the command line shows it before it starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from afina.data.columns import chosen_columns
from afina.data.divide import divided
from afina.data.example import Example
from afina.errors import ConfigError, DataError, MissingDependencyError, Problems, TrainingError, did_you_mean
from afina.functions import get_peft_model
from afina.memory.heap import large_tensors_apart
from afina.memory.loading import check_library
from afina.memory.offload import check_offload
from afina.memory.step import lean_step
from afina.memory.storage import Storage, settled_weights
from afina.tasks.catalogue import find_task, tasks
from afina.tasks.other_files import rows_of
from afina.tasks.task import Encoded, Rows
from afina.training import checkpoints
from afina.training.cache import Part, encoded_once
from afina.training.engines.choose import check_engine
from afina.training.first import first_of_the_node
from afina.training.models import aim, find_model, load_config, load_processor
from afina.training.plan import planner_of
from afina.training.precision import choose_precision, slow_precision
from afina.training.recipe import Recipe
from afina.training.run_folder import RECIPE
from afina.training.running import Run
from afina.training.shared import Shared
from afina.training.start import find_start
from afina.training.vocabulary import add_tokens, fit_embeddings
from afina.training.within_limit import settle

__all__ = ["prepare"]


def prepare(
    recipe: Recipe,
    output: Path | None,
    *,
    spell: Callable[[str], str] = str,
    problems: Problems | None = None,
    overwrite: bool = False,
    resume: bool = False,
    from_step: int | None = None,
    trial: bool = False,
    shared: Shared | None = None,
) -> Run:
    """Check the recipe, read and split the data, load and adapt the model. Nothing is written.

    Of several processes of a machine the first one prepares, the others find the encoded rows in the cache (T40).
    `spell` says how an option was typed; `problems` may hold what was found before. A `trial` needs no output folder and
    cannot be executed. `shared` is what runs of one process have in common.
    Raises ConfigError with everything wrong in the options, DataError with everything wrong in the file.
    """
    with first_of_the_node():
        return _prepared(recipe, output, spell, problems or Problems("the recipe"), overwrite, resume, from_step, trial,
                         shared or Shared())  # fmt: skip


def _prepared(
    recipe: Recipe,
    output: Path | None,
    spell: Callable[[str], str],
    problems: Problems,
    overwrite: bool,
    resume: bool,
    from_step: int | None,
    trial: bool,
    shared: Shared,
) -> Run:
    start = find_start(recipe, problems, spell)
    config = recipe.check(problems, spell)
    chosen = tasks().get(str(recipe.task["name"]))
    kind = chosen.kind_for(recipe.task) if chosen is not None else None
    asks = recipe.task if chosen is None or kind is not chosen.kind else recipe.task["name"]  # what rows are made as
    table, columns = None, dict[str, str]()
    if kind is None:
        pass  # the recipe's check has told it
    elif not recipe.data.file:
        for role in ("file", *(role for role, column in kind.columns.items() if column.required)):
            if not getattr(recipe.data, role):
                problems.add(f"{spell(f'data.{role}')} is missing")
    else:
        try:
            table = shared.once("rows", (asks, recipe.data), lambda: rows_of(recipe.data, kind, spell))
            columns = chosen_columns(table, kind, recipe.data, problems, spell)
        except (DataError, MissingDependencyError) as error:
            problems.add(f"{spell('data.file')}: {error}")
    source = None
    try:
        source = find_model(recipe.model, pipeline=chosen is not None and chosen.pipelines)
    except (ConfigError, MissingDependencyError) as error:
        problems.add(f"{spell('model')}: {error}")
    device = _device()
    precision = "fp32"
    try:
        precision = choose_precision(recipe.training.precision, device)
    except ConfigError as error:
        problems.add(str(error).replace("precision=", f"{spell('training.precision')}=", 1))
    try:
        check_library(recipe.memory.weights)
    except MissingDependencyError as error:
        problems.add(f"{spell('memory.weights')}: {error}")
    if recipe.memory.activation_offload:
        try:
            check_offload(device, spell("memory.activation_offload"))
        except ConfigError as error:
            problems.add(str(error))
    check_engine(recipe, precision, problems, spell)
    if output is None and not trial:
        problems.add(f"{spell('output')} is missing: the folder to write the run into, for example runs/first")
    elif output is not None:
        _check_output(output, problems, overwrite=overwrite, resume=resume)
    if from_step is not None and not resume:
        problems.add("--from-step goes with --resume")
    elif from_step is not None and output is not None:
        try:
            checkpoints.chosen(output / "checkpoints", from_step)
        except TrainingError as error:
            problems.add(str(error))
    if start is not None and config is not None:
        config = start.settled(recipe, config, problems, spell)
    if kind is not None and find_task(recipe.task["name"]).writes_rows and recipe.distributed.engine != "ddp":
        problems.add(
            f"{spell('distributed.engine')}={recipe.distributed.engine}: {recipe.task['name']} lets the model write in "
            "every step, which needs whole weights in every process; take ddp"
        )
    problems.raise_as(ConfigError)
    assert table is not None
    assert kind is not None
    assert source is not None

    seed = recipe.training.seed
    rows_are = (asks, recipe.data, columns, seed)
    done = shared.once("split", rows_are, partial(divided, table, kind, recipe.data, columns=columns, seed=seed))
    table = None  # the cells that no example holds are let go
    splits = {name: [done.examples[i] for i in rows] for name, rows in done.sides.items()}

    made = find_task(recipe.task["name"]).for_base(load_config(source))
    options = made.Options(**{k: v for k, v in recipe.task.items() if k != "name"})
    learned = made.learn(splits["train"], [*splits["validation"], *splits["test"]])
    named = (source, recipe.task, recipe.data.new_tokens, recipe.start)
    saved = None if start is None else start.tokenizer
    processor = shared.once("processor", named, lambda: load_processor(source, made.processor_kind, saved))
    task = made(processor, options, learned)
    task.check_options(spell)
    if task.tokenizer is not None:
        add_tokens(task.tokenizer, recipe.data.new_tokens)
    if done.weights is not None:
        task.class_weights = task.weights(done.weights)
    recipe.training.best = recipe.training.best or next(iter(task.figures))
    if recipe.training.best not in task.figures:
        asked = f"{spell('training.best')}={recipe.training.best!r}"
        raise ConfigError(f"{asked}: these rows give no such figure.{did_you_mean(recipe.training.best, task.figures)}")
    recipe.memory.weights = _weights(recipe.memory.weights, load_config(source), precision, spell)
    choice = None
    if recipe.memory.limit is not None:
        planner = planner_of(recipe, task, source, config, splits, "cpu" if device.type == "cpu" else "cuda", precision)
        choice = settle(planner, recipe, spell)
    task.storage = Storage.of(recipe.memory.weights, load_config(source))
    torch.manual_seed(seed)
    config.base_model_name_or_path = source.public_name
    large_tensors_apart()  # what loading lets go goes back
    base = shared.base(task, source.path, (named, learned, recipe.memory.weights, seed))
    asked = spell("data.new_tokens") if recipe.data.new_tokens else "the tokenizer"
    notes = slow_precision(precision, device) + fit_embeddings(base, task.tokenizer, config, asked)
    limit = task.limit(base) - int(getattr(config, "num_virtual_tokens", None) or 0)
    if recipe.training.max_length is not None and (task.tokenizer is None or task.unit == "samples"):
        raise ConfigError(f"{spell('training.max_length')}: {task.name} reads no tokens, so it does nothing; leave it out")
    if recipe.training.max_length is not None and recipe.training.max_length > limit:
        asked = f"{spell('training.max_length')}={recipe.training.max_length}"
        raise ConfigError(f"{asked}: {recipe.model} takes at most {limit} tokens")
    if start is None:
        notes += aim(config, task, base)
    model = get_peft_model(base, config) if start is None else start.model(base, task)
    notes += lean_step(
        model, device, gradient_checkpointing=recipe.memory.gradient_checkpointing,
        activation_offload=recipe.memory.activation_offload, roomy=recipe.memory.roomy(device.type), spell=spell,
    )  # fmt: skip
    notes += task.paths(model)
    recipe.resolve_method(model.peft_config["default"])
    everything = [e for examples in splits.values() for e in examples]
    about = (named, rows_are, recipe.memory.weights, recipe.training.max_length, limit)
    encoded = shared.once("encoded", about, lambda: encoded_once(task, everything, recipe.training.max_length, limit))
    recipe.training.max_length = encoded.max_length
    _check_truncation(encoded, len(everything), recipe, spell, limit)
    rows = shared.once("sides", about, lambda: _sides(splits, encoded))
    _check_tokens(rows["train"], recipe, spell)
    return Run(
        recipe, output or Path(), source, task, model, rows, done, columns, notes, encoded, precision, overwrite, resume,
        from_step, choice, shared, about,
    )  # fmt: skip


def _sides(splits: Mapping[str, list[Example]], encoded: Encoded) -> dict[str, Rows]:
    """Features back to the sides that their examples are on; each then counts its own examples."""
    sides, first, of_row = {}, 0, [feature["row"] for feature in encoded.features]
    for name, examples in splits.items():
        last = first + len(examples)
        own = [i for i, row in enumerate(of_row) if first <= row < last]
        sides[name], first = Rows(examples, Part(encoded.features, own, first)), last
    return sides


def _check_output(output: Path, problems: Problems, *, overwrite: bool, resume: bool) -> None:
    above = next((folder for folder in output.absolute().parents if folder.exists()), output)
    if output.is_file():
        problems.add(f"--output {output} is a file; give a folder")
    elif not above.is_dir():
        problems.add(f"--output {output}: {above} is a file; give a folder that can be made")
    elif not os.access(output if output.is_dir() else above, os.W_OK | os.X_OK):
        found = output if output.is_dir() else above
        problems.add(f"--output {output}: {found} may not be written to; give a folder of your own")
    elif resume and not (output / "checkpoints").is_dir():
        problems.add(f"--resume: {output} holds no run with checkpoints; leave --resume out to start one")
    elif output.is_dir() and any(output.iterdir()) and not resume:
        if not overwrite:
            cure = "take another folder, or add --overwrite to replace the run in it"
            problems.add(f"--output {output} exists and is not empty; {cure}")
        elif not (output / RECIPE).is_file():
            problems.add(f"--output {output} holds no run of afina, so --overwrite does not touch it; take another folder")


def _check_truncation(encoded: Encoded, texts: int, recipe: Recipe, spell: Callable[[str], str], limit: int) -> None:
    share = encoded.truncated / texts
    if share > recipe.training.max_truncated and encoded.max_length is None:
        raise DataError(
            f"{encoded.truncated} of {texts} rows ({share:.0%}) are cut off: {'; '.join(encoded.notes)}. "
            f"{spell('training.max_truncated')} allows {recipe.training.max_truncated:.0%}: cut the rest into pieces, "
            "or allow more"
        )
    if share > recipe.training.max_truncated:
        cure = (
            f"raise {spell('training.max_length')} (the model takes up to {limit})"
            if (encoded.max_length or limit) < limit
            else "shorten the texts or take a model for longer ones"
        )
        raise DataError(
            f"{encoded.truncated} of {texts} texts ({share:.0%}) are longer than {encoded.max_length} tokens and "
            f"would be cut off; {spell('training.max_truncated')} allows {recipe.training.max_truncated:.0%}: {cure}, or "
            "allow more"
        )


def _check_tokens(train: Rows, recipe: Recipe, spell: Callable[[str], str]) -> None:
    """A row has to fit into a step that is counted in tokens."""
    tokens, longest = recipe.training.batch_tokens, max(train.lengths, default=0)
    if tokens and longest > tokens:
        raise ConfigError(
            f"{spell('training.batch_tokens')}={tokens}: the longest training row has {longest} tokens; take at least that, "
            f"or cut rows by {spell('training.max_length')}"
        )


def _weights(asked: str, config: Any, precision: str, spell: Callable[[str], str]) -> str:
    """The storage of the frozen weights; an error names the option as it was typed."""
    try:
        return settled_weights(asked, config, precision)
    except ConfigError as error:
        raise ConfigError(str(error).replace("memory.weights=", f"{spell('memory.weights')}=", 1)) from error


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
