"""A whole run: `prepare` finds out and checks everything that can be known before, `Run.execute` trains and writes.

Between the two the command line shows what is about to happen. The test rows are read once, after the best epoch was
chosen. The adapter that was written is loaded into a fresh base and compared before the run counts as done.
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch

from afina.core.files import write_atomically
from afina.core.fingerprint import fingerprint
from afina.data.columns import chosen_columns
from afina.data.divide import Divided, divided
from afina.data.example import Example
from afina.data.sources import read_rows
from afina.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingDependencyError,
    Problems,
    TrainingError,
    did_you_mean,
)
from afina.functions import get_peft_model
from afina.memory.loading import check_library
from afina.memory.measure import release
from afina.memory.offload import check_offload
from afina.memory.step import lean_step
from afina.memory.storage import Storage, settled_weights
from afina.model import PeftModel
from afina.report.card import write_card
from afina.report.html import REPORT, write_report
from afina.report.statistics import histogram
from afina.tasks.catalogue import find_task, task_from_settings, tasks
from afina.tasks.reference import REFERENCE, reference
from afina.tasks.task import Encoded, Rows, Task
from afina.training import checkpoints
from afina.training.cache import Part, encoded_once
from afina.training.engines.choose import check_engine, make_engine
from afina.training.engines.engine import Engine
from afina.training.engines.lost import told_of_lost_processes
from afina.training.fast_path import fast_path
from afina.training.first import first_of_the_node
from afina.training.loop import Fitted, fit, predict
from afina.training.models import ModelSource, aim, find_model, load_config, load_processor
from afina.training.packing import settle_packing
from afina.training.parts import settle_parts
from afina.training.plan import planner_of
from afina.training.precision import choose_precision
from afina.training.recipe import Recipe
from afina.training.shared import Shared
from afina.training.start import find_start
from afina.training.trackers import Trackers
from afina.training.vocabulary import add_tokens, fit_embeddings
from afina.training.within_limit import Choice, settle

__all__ = ["Run", "prepare", "write_csv"]

SPLITS = ("train", "validation", "test")
RECIPE, ADAPTER, DATA, METRICS, PREDICTIONS = "recipe.yaml", "adapter", "data", "metrics.json", "predictions.csv"
_COMPARED = 8  # features that are compared when the adapter is read back
_TOLERANCE = 1e-4  # of probabilities of the adapter read back, on the device and in float32


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
    table, columns = None, dict[str, str]()
    if kind is None:
        pass  # the recipe's check has told it
    elif not recipe.data.file:
        for role in ("file", *(role for role, column in kind.columns.items() if column.required)):
            if not getattr(recipe.data, role):
                problems.add(f"{spell(f'data.{role}')} is missing")
    else:
        try:
            table = shared.once("rows", recipe.data, lambda: read_rows(recipe.data, kind))
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
    rows_are = (recipe.task["name"], recipe.data, columns, seed)
    done = shared.once("split", rows_are, partial(divided, table, kind, recipe.data, columns=columns, seed=seed))
    table = None  # the cells that no example holds are let go
    splits = {name: [done.examples[i] for i in rows] for name, rows in done.sides.items()}

    load_config(source)
    made = find_task(recipe.task["name"])
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
    base = shared.base(task, source.path, (named, learned, recipe.memory.weights, seed))
    asked = spell("data.new_tokens") if recipe.data.new_tokens else "the tokenizer"
    notes = fit_embeddings(base, task.tokenizer, config, asked)
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
        activation_offload=recipe.memory.activation_offload, spell=spell,
        tight=recipe.memory.tight,
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


@dataclass
class Run:
    """Everything that is ready to be trained, and what is known of it."""

    recipe: Recipe
    output: Path
    source: ModelSource
    task: Task
    model: PeftModel
    rows: dict[str, Rows]
    divided: Divided
    columns: dict[str, str]  # role -> column of the file
    notes: list[str]  # what was found out about tokenizer and model
    encoded: Encoded
    precision: str
    overwrite: bool = False
    resume: bool = False
    from_step: int | None = None
    choice: Choice | None = None  # of settings that fit into memory.limit
    shared: Shared = field(default_factory=Shared)
    about: Any = None  # what rows and base follow from
    told: list[str] = field(default_factory=list)  # of the way the run is computed, by whoever started it

    def classes(self, split: str) -> dict[str, int]:
        """Rows of each class on one side of the split."""
        counts = Counter(e.label for e in self.rows[split].examples)
        return {label: counts[label] for label in self.task.labels}

    def example(self) -> tuple[Example, list[str], list[bool]]:
        """A training row of middling length, its tokens as the model gets them, and which of them are targets."""
        rows = self.rows["train"]
        order = sorted(range(len(rows.features)), key=lambda i: rows.lengths[i])
        middle = rows.features[order[len(order) // 2]]
        return rows.examples[middle["row"]], *self.task.rendered(middle)

    def execute(
        self, tell: Callable[[dict[str, Any]], None] = lambda line: None, engine: Engine | None = None
    ) -> dict[str, Any]:
        """Train, test, save, read back; returns what `metrics.json` holds. `engine`: one that is there already."""
        asked = self.recipe.distributed
        engine = engine or make_engine(self.precision, asked.engine, offload=asked.offload)
        with told_of_lost_processes(engine), closing(engine):
            return self._executed(engine, tell)

    def _executed(self, engine: Engine, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        engine.wait()  # every process has looked at the output folder before one writes into it
        if engine.main:
            self._write_inputs()
        engine.wait()
        options = self.recipe.training
        if engine.sharded:
            self.model.adapters.base = fingerprint(self.model.adapters)
        counts = self.model.get_nb_trainable_parameters()
        engine.place(self.model)
        last = checkpoints.chosen(self.output / "checkpoints", self.from_step) if self.resume else None
        step = int(last.name.partition("-")[2]) if last else 0
        names = options.trackers if engine.main else []
        with Trackers(names, self.output, asdict(self.recipe), step) as trackers:

            def told(line: dict[str, Any]) -> None:
                trackers(line)
                tell(line)

            def say(sentence: str) -> None:
                if engine.main:
                    tell({"said": sentence})

            notes = [*self.told, *settle_packing(self.model, self.task, self.rows, options, engine)]
            if options.gradient_accumulation == "auto":
                notes += settle_parts(self.model, self.task, self.rows, self.recipe, engine)
                if engine.main:
                    self._write_recipe()
            began = time.perf_counter()
            spare = not (self.recipe.memory.tight or self.recipe.memory.activation_offload)
            with fast_path(self.model, self.task, self.rows, options, engine, say, spare=spare) as found:
                ready = time.perf_counter() - began
                fitted = fit(
                    self.model, self.task, self.rows["train"], self.rows["validation"], options, engine, self.output,
                    tell=told, resume=self.resume, from_step=self.from_step,
                )  # fmt: skip
            notes += found
            fitted.notes[:0] = notes
            fitted.seconds += ready  # what was computed once is part of the training
            self._settle(engine)
            test = self.rows["test"]
            with self.shared.reading(self, engine):
                answers = predict(self.model, self.task, test, options.read_at_once, engine, exact=True, final=True)
            metrics = self._metrics(fitted, answers, counts)
            before: list[dict[str, str]] = []
            if self.task.untuned:
                figures, before = self.shared.once("untuned", self.about, lambda: self._untuned(engine))
                metrics["baselines"]["untuned"] = {"title": "the base, not tuned", **figures}
            trackers.tested(metrics["test"])
        with engine.whole():
            if engine.main:
                self._write_predictions(answers, before if self.task.shows_before else [])
                own = ["default"]
                self.model.save_pretrained(self.output / ADAPTER, selected_adapters=own, tokenizer=self.task.tokenizer)
                if REFERENCE in self.model.peft_config:  # figures of this run are measured against it
                    self.model.save_pretrained(self.output, selected_adapters=[REFERENCE])
                if self.task.processor is not self.task.tokenizer:
                    self.task.processor.save_pretrained(self.output / ADAPTER)
        batch, trained = self._compared(engine)
        if engine.main:
            metrics["read_back"] = self._read_back(batch, trained, engine)
            metrics |= self.task.finish(self.model, self.output, self.rows["test"].features[:_COMPARED])
            _write_json(self.output / METRICS, metrics)
            write_report(self.output)
            write_card(self.output)
        engine.wait()
        return metrics

    def _untuned(self, engine: Engine) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Figures of the base, or of what the run starts from, and its answers as columns."""
        test, size = self.rows["test"], self.recipe.training.read_at_once
        with reference(self.model) if self.task.compares else self.model.disable_adapter():
            answers = predict(self.model, self.task, test, size, engine, exact=True, final=True)
        columns = [self.task.columns(answer, example) for answer, example in zip(answers, test.examples, strict=True)]
        return self.task.metrics(answers, test.examples), columns

    def _settle(self, engine: Engine) -> None:
        """Let the task choose on the validation rows what it is asked to choose there."""
        if self.task.settles:
            rows, size = self.rows["validation"], self.recipe.training.read_at_once
            answers = predict(self.model, self.task, rows, size, engine, exact=True)
            self.task.learned |= self.task.settle(answers, rows.examples)

    # --- what is written

    def _write_inputs(self) -> None:
        if self.overwrite and not self.resume and (self.output / RECIPE).is_file():
            for name in (RECIPE, METRICS, PREDICTIONS, REPORT, "log.jsonl"):
                (self.output / name).unlink(missing_ok=True)
            for name in (ADAPTER, DATA, REFERENCE, "checkpoints", "pictures", "tensorboard"):
                shutil.rmtree(self.output / name, ignore_errors=True)
        (self.output / DATA).mkdir(parents=True, exist_ok=True)
        for name, rows in self.rows.items():
            lines = [[*(e.row[role] for role in self.columns), e.line] for e in rows.examples]
            write_csv(self.output / DATA / f"{name}.csv", [*self.columns.values(), "line"], lines)
        lengths = sorted(self.encoded.lengths)
        last = len(lengths) - 1
        report = {
            "file": self.recipe.data.file,
            "columns": self.columns,
            **self.divided.report(),
            "notes": [*self.divided.notes, *self.encoded.notes],
            "truncated": self.encoded.truncated,
            "max_length": self.encoded.max_length,
        }
        if lengths[0] != lengths[-1] or self.task.tokenizer is not None:
            report |= {
                "unit": self.task.unit,
                "tokens": {f"{share} %": lengths[last * share // 100] for share in (0, 5, 25, 50, 75, 95, 100)},
                "token_histogram": histogram(lengths),
            }
        _write_json(self.output / DATA / "data_report.json", report)
        self._write_recipe()

    def _write_recipe(self) -> None:
        head = "# The whole run. To repeat it: afina train recipe.yaml --output ANOTHER_FOLDER\n"
        labels = "".join(f"#   {i}  {json.dumps(label, ensure_ascii=False)}\n" for i, label in enumerate(self.task.labels))
        classes = f"# Classes, in the order of the model's outputs:\n{labels}" if labels else ""
        text = f"{head}{classes}{self.recipe.to_yaml()}"
        write_atomically(self.output / RECIPE, lambda path: path.write_text(text, encoding="utf-8"))

    def _write_predictions(self, answers: Sequence[Any], before: Sequence[Mapping[str, str]]) -> None:
        rows, titles = [], list[str]()
        examples = self.rows["test"].examples
        tabled = self.task.tabled(answers, examples)
        for i, (example, answer, said) in enumerate(zip(examples, answers, tabled, strict=True)):
            right = self.task.right(answer, example)
            if before:
                said["before"] = before[i]["answer"]
                said |= {"reward before": before[i]["reward"]} if "reward" in before[i] else {}
            titles = ["answer", *([] if right is None else ["right"]), *(k for k in said if k != "answer")]
            known = {**said, "right": "yes" if right else "no"}
            rows.append([example.line, *(example.row[role] for role in self.columns), *(known[k] for k in titles)])
        write_csv(self.output / PREDICTIONS, ["line", *self.columns.values(), *titles], rows)

    def _baselines(self) -> dict[str, dict[str, Any]]:
        return self.task.baselines(self.rows["train"], self.rows["test"])

    def _metrics(self, fitted: Fitted, answers: Sequence[Any], counts: tuple[int, int]) -> dict[str, Any]:
        trainable, total = counts
        return {
            "task": self.task.settings(),
            "figures": {key: asdict(figure) for key, figure in self.task.figures.items()},
            "test": self.task.metrics(answers, self.rows["test"].examples),
            "validation": fitted.validation,
            "baselines": {**self.shared.once("baselines", self.about, self._baselines)},
            "train": {
                "seconds": round(fitted.seconds, 2),
                "steps": fitted.steps,
                "best_epoch": fitted.best_epoch,
                "unit": self.task.unit,
                "tokens": fitted.tokens,
                "tokens_per_second": round(fitted.tokens / fitted.seconds, 1),
                "peak_memory_bytes": fitted.peak_memory_bytes,
                "trainable_parameters": trainable,
                "total_parameters": total,
                "precision": self.precision,
                **fitted.built,
                "threads": torch.get_num_threads(),
                "notes": fitted.notes,
            },
            "versions": _versions(),
        }

    @torch.no_grad()
    def _compared(self, engine: Engine) -> tuple[list[int], torch.Tensor]:
        """The longest test rows, and what the trained model makes of them."""
        rows = self.rows["test"]
        longest = sorted(range(len(rows.features)), key=lambda i: -rows.lengths[i])[:_COMPARED]
        chosen = sorted({rows.features[i]["row"] for i in longest})
        features = [f for f in rows.features if f["row"] in chosen][:_COMPARED]
        batch = {k: v.to(engine.device) for k, v in self.task.collate(features).items()}
        return chosen, engine.read(self.model.eval(), self.task.outputs, batch)

    @torch.no_grad()
    def _read_back(self, chosen: list[int], trained: torch.Tensor, engine: Engine) -> dict[str, float]:
        """Load what was written into a fresh base and compare on the `chosen` test rows with what was `trained`.

        Raises CheckpointError where the answers differ by more than rounding.
        """
        device, folder, rows = engine.device, self.output / ADAPTER, self.rows["test"]
        if engine.name == "ddp":  # the memory of one base is enough for both
            _emptied(self.model)
            release(device)
        processor = load_processor(self.source, self.task.processor_kind, folder)
        task = task_from_settings(self.task.settings(), processor)
        task.storage = self.task.storage
        fresh = PeftModel.from_pretrained(task.load_model(self.source.path), folder, tokenizer=task.tokenizer).to(device)
        length = self.encoded.max_length
        again = task.encode([rows.examples[i] for i in chosen], length, length or 0).features
        if [f.get("input_ids") for f in again] != [f.get("input_ids") for f in rows.features if f["row"] in chosen]:
            raise CheckpointError(f"{folder}: the tokenizer that was written splits texts differently when read back")
        batch = {k: v.to(device) for k, v in task.collate(again[:_COMPARED]).items()}
        difference = float((trained - task.outputs(fresh.eval(), batch)).abs().max())
        if not difference <= _TOLERANCE:
            raise CheckpointError(
                f"{folder}, read back, does not answer as the model that was trained: probabilities differ by up to "
                f"{difference:.2g}. Do not use it, and please report this"
            )
        self.model = fresh
        return {"rows": len(again[:_COMPARED]), "largest_difference": difference}


def _emptied(model: torch.nn.Module) -> None:
    """Let the weights of a model go, whoever still holds it."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update(dict.fromkeys(held))


def _check_output(output: Path, problems: Problems, *, overwrite: bool, resume: bool) -> None:
    if output.is_file():
        problems.add(f"--output {output} is a file; give a folder")
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


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("afina", "torch", "transformers", "tokenizers", "accelerate", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file whole or not at all."""

    def write(beside: Path) -> None:
        with beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(_Lines(file))  # which ends records by \r\n, so that a text with either is quoted
            writer.writerow(columns)
            writer.writerows(rows)

    write_atomically(path, write)


class _Lines:
    """Ends each record by a line feed alone."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, record: str) -> None:
        self.file.write(record.removesuffix("\r\n") + "\n")
