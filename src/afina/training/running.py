"""`Run`: everything that is ready to be trained; `Run.execute` trains, tests, writes and reads back.

The test rows are read once, after the best epoch was chosen. The adapter that was written is loaded into a fresh base and
compared before the run counts as done.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from afina.core.checkpoint import EXTRA_NAME
from afina.core.fingerprint import fingerprint
from afina.data.divide import Divided
from afina.data.example import Example
from afina.errors import CheckpointError
from afina.memory.heap import large_tensors_kept
from afina.memory.measure import give_back
from afina.model import PeftModel
from afina.report.card import CARD, write_card
from afina.report.folder import read_run
from afina.report.html import write_report
from afina.tasks.catalogue import task_from_settings
from afina.tasks.reference import REFERENCE, reference
from afina.tasks.task import Encoded, Rows, Task
from afina.training import checkpoints
from afina.training.engines.choose import make_engine
from afina.training.engines.engine import Engine
from afina.training.engines.lost import told_of_lost_processes
from afina.training.fast_path import fast_path
from afina.training.loop import Fitted, fit, predict
from afina.training.models import ModelSource, load_config, load_processor
from afina.training.packing import settle_packing
from afina.training.parts import settle_parts
from afina.training.recipe import Recipe
from afina.training.run_folder import (
    ADAPTER,
    METRICS,
    emptied,
    versions,
    write_data,
    write_json,
    write_predictions,
    write_recipe,
)
from afina.training.shared import Shared
from afina.training.trackers import Trackers
from afina.training.within_limit import Choice

__all__ = ["Run"]

_COMPARED = 8  # features that are compared when the adapter is read back
_TOLERANCE = 1e-4  # of probabilities of the adapter read back, on the device and in float32


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
        roomy = self.recipe.memory.roomy(engine.device.type)
        with large_tensors_kept(roomy), told_of_lost_processes(engine), closing(engine):
            return self._executed(engine, tell)

    def _executed(self, engine: Engine, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        engine.wait()  # every process has looked at the output folder before one writes into it
        if engine.main:
            self._begin()
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
                    write_recipe(self.output, self.recipe, self.task.labels)
            began = time.perf_counter()
            spare = not (self.recipe.memory.tight or self.recipe.memory.activation_offload)
            once = partial(self.once, "training", engine)
            with fast_path(self.model, self.task, self.rows, options, engine, say, spare=spare, once=once) as found:
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
                alike = self.task.storage.weights == "fp32"  # computed as the test rows are
                compared = self._compared(engine) if alike else None
            metrics = self._metrics(fitted, answers, counts)
            before: list[dict[str, str]] = []
            if self.task.untuned:
                figures, before = self.shared.once("untuned", self.about, lambda: self._untuned(engine))
                metrics["baselines"]["untuned"] = {"title": "the base, not tuned", **figures}
            trackers.tested(metrics["test"])
        with engine.whole():
            if engine.main:
                write_predictions(
                    self.output, self.task, self.columns, test.examples, answers, before if self.task.shows_before else []
                )
                own = ["default"]
                self.model.save_pretrained(self.output / ADAPTER, selected_adapters=own, tokenizer=self.task.tokenizer)
                if REFERENCE in self.model.peft_config:  # figures of this run are measured against it
                    self.model.save_pretrained(self.output, selected_adapters=[REFERENCE])
                if self.task.processor is not self.task.tokenizer:
                    self.task.processor.save_pretrained(self.output / ADAPTER)
        chosen, trained = compared or self._compared(engine)
        if engine.main:
            metrics["read_back"] = self._read_back(chosen, trained, engine)
            metrics |= self.task.finish(self.model, self.output, self.rows["test"].features[:_COMPARED])
            write_json(self.output / METRICS, metrics)
            shown = read_run(self.output)
            write_report(shown)
            write_card(shown)
        engine.wait()
        return metrics

    def once(self, what: str, engine: Engine, part: str, make: Callable[[], Any]) -> Any:
        """What is the same for all runs of a sweep with these rows whose models are built alike and computed alike."""
        recipe = self.recipe
        about = (self.about, recipe.method, recipe.memory, recipe.training.frozen_dropout, engine.name, engine.precision)
        return self.shared.once(f"{part} for {what}", about, make)

    def _untuned(self, engine: Engine) -> tuple[dict[str, Any], list[dict[str, str]]]:
        """Figures of the base, or of what the run starts from, and its answers as columns."""
        test, size = self.rows["test"], self.recipe.training.read_at_once
        with reference(self.model) if self.task.compares else self.model.disable_adapter():
            answers = predict(self.model, self.task, test, size, engine, exact=True, final=True)
        columns = [self.task.columns(answer, example) for answer, example in zip(answers, test.examples, strict=True)]
        return self.task.metrics(answers, test.examples), columns

    def _begin(self) -> None:
        """Make the folder, with the rows and the recipe in it."""
        if self.overwrite and not self.resume:
            emptied(self.output)
        file = self.recipe.data.file
        write_data(self.output, file, self.task, self.columns, self.rows, self.divided, self.encoded)
        write_recipe(self.output, self.recipe, self.task.labels)

    def _settle(self, engine: Engine) -> None:
        """Let the task choose on the validation rows what it is asked to choose there."""
        if self.task.settles:
            rows, size = self.rows["validation"], self.recipe.training.read_at_once
            answers = predict(self.model, self.task, rows, size, engine, exact=True)
            self.task.learned |= self.task.settle(answers, rows.examples)

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
                "findings": fitted.findings,
            },
            "versions": versions(),
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
            _let_go(self.model)
            give_back(device)
        load = partial(load_processor, self.source, self.task.processor_kind, folder)
        written = (self.source, self.recipe.task, _digest(folder))
        processor = self.shared.once("processor as written", written, load)
        task = task_from_settings(self.task.settings(), processor, load_config(self.source))
        task.storage = self.task.storage
        base = self.shared.fresh(task, self.source.path, self.about)
        fresh = PeftModel.from_pretrained(base, folder, tokenizer=task.tokenizer).to(device)
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


def _digest(folder: Path) -> str:
    """Of what was written beside the adapter: equal files are read as equal tokenizers."""
    made = hashlib.blake2b()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("adapter_")):
        if file.name not in (EXTRA_NAME, CARD):
            made.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode() + file.read_bytes())
    return made.hexdigest()


def _let_go(model: torch.nn.Module) -> None:
    """Let the weights of a model go, whoever still holds it."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update(dict.fromkeys(held))
