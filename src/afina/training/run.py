"""A whole run: `prepare` finds out and checks everything that can be known before, `Run.execute` trains and writes.

Between the two the command line shows what is about to happen. The test rows are read once, after the best epoch was
chosen. The adapter that was written is loaded into a fresh base and compared before the run counts as done.
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afina.core.files import write_atomically
from afina.data.clean import CleanReport, Example
from afina.data.divide import divided
from afina.data.read import read_table
from afina.errors import CheckpointError, ConfigError, DataError, MissingDependencyError, Problems
from afina.functions import get_peft_model
from afina.model import PeftModel
from afina.report.html import REPORT, write_report
from afina.tasks.sequence_classification import Encoded, SequenceClassification
from afina.training.loop import Fitted, Rows, fit, make_accelerator, predict
from afina.training.models import ModelSource, find_model, load_config, load_tokenizer
from afina.training.precision import choose_precision
from afina.training.recipe import Recipe

__all__ = ["Run", "prepare", "write_csv"]

SPLITS = ("train", "validation", "test")
RECIPE, ADAPTER, DATA, METRICS, PREDICTIONS = "recipe.yaml", "adapter", "data", "metrics.json", "predictions.csv"
_TOLERANCE = 1e-4  # of probabilities of the adapter read back, on the device and in float32


def prepare(
    recipe: Recipe,
    output: Path | None,
    *,
    spell: Callable[[str], str] = str,
    problems: Problems | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Run:
    """Check the recipe, read and split the data, load and adapt the model. Nothing is written.

    `spell` says how an option was typed; `problems` may hold what was found before.
    Raises ConfigError with everything wrong in the options, DataError with everything wrong in the file.
    """
    problems = problems or Problems("the recipe")
    config = recipe.check(problems, spell)
    table = None
    if recipe.data.file:
        try:
            table = read_table(recipe.data.file, {recipe.data.text, recipe.data.label} - {""})
            recipe.data.text, recipe.data.label = recipe.data.text or table.text, recipe.data.label or table.label
            for key in ("text", "label"):
                column = getattr(recipe.data, key)
                if column and (missing := table.missing(column)):
                    problems.add(f"{spell(f'data.{key}')}: {missing}")
            if recipe.data.text and recipe.data.text == recipe.data.label:
                problems.add(f"{spell('data.text')} and {spell('data.label')} are both {recipe.data.text!r}")
        except (DataError, MissingDependencyError) as error:
            problems.add(f"{spell('data.file')}: {error}")
    for key in ("file", "text", "label"):
        if not getattr(recipe.data, key):
            problems.add(f"{spell(f'data.{key}')} is missing")
    source = None
    try:
        source = find_model(recipe.model)
    except (ConfigError, MissingDependencyError) as error:
        problems.add(f"{spell('model')}: {error}")
    device = _device()
    precision = "fp32"
    try:
        precision = choose_precision(recipe.training.precision, device)
    except ConfigError as error:
        problems.add(str(error).replace("precision=", f"{spell('training.precision')}=", 1))
    if output is None:
        problems.add(f"{spell('output')} is missing: the folder to write the run into, for example runs/first")
    else:
        _check_output(output, problems, overwrite=overwrite, resume=resume)
    problems.raise_as(ConfigError)
    assert output is not None
    assert table is not None
    assert source is not None

    shares = {"validation": recipe.data.validation, "test": recipe.data.test}
    done = divided(table, recipe.data.text, recipe.data.label, **shares, seed=recipe.training.seed)
    examples, cleaned, sides = done.examples, done.cleaned, list(done.sides.values())
    labels = sorted(cleaned.classes)
    splits = {name: [examples[i] for i in rows] for name, rows in zip(SPLITS, sides, strict=True)}

    load_config(source)
    task = SequenceClassification(labels, load_tokenizer(source))
    torch.manual_seed(recipe.training.seed)
    config.base_model_name_or_path = source.public_name
    base = task.load_model(source.path)
    limit = task.limit(base) - int(getattr(config, "num_virtual_tokens", None) or 0)
    if recipe.training.max_length is not None and recipe.training.max_length > limit:
        asked = f"{spell('training.max_length')}={recipe.training.max_length}"
        raise ConfigError(f"{asked}: {recipe.model} takes at most {limit} tokens")
    model = get_peft_model(base, config)
    recipe.resolve_method(model.peft_config["default"])
    encoded = task.encode([e.text for e in examples], recipe.training.max_length, limit)
    recipe.training.max_length = encoded.max_length
    _check_truncation(encoded, recipe, spell, limit)
    rows = {
        name: Rows([encoded.ids[i] for i in side], [labels.index(examples[i].label) for i in side])
        for name, side in zip(SPLITS, sides, strict=True)
    }
    found = {"near_duplicates": done.near, "leaks": done.leaks, "notes": done.notes}
    return Run(recipe, output, source, task, model, splits, rows, cleaned, encoded, precision, found, overwrite, resume)


@dataclass
class Run:
    """Everything that is ready to be trained, and what is known of it."""

    recipe: Recipe
    output: Path
    source: ModelSource
    task: SequenceClassification
    model: PeftModel
    splits: dict[str, list[Example]]
    rows: dict[str, Rows]
    cleaned: CleanReport
    encoded: Encoded
    precision: str
    found: dict[str, Any]  # what dividing the rows brought to light
    overwrite: bool = False
    resume: bool = False

    def classes(self, split: str) -> dict[str, int]:
        """Rows of each class on one side of the split."""
        counts = Counter(e.label for e in self.splits[split])
        return {label: counts[label] for label in self.task.labels}

    def example(self) -> tuple[Example, list[str]]:
        """A training row of middling length, and its tokens as the model gets them."""
        order = sorted(range(len(self.rows["train"].ids)), key=lambda i: len(self.rows["train"].ids[i]))
        middle = order[len(order) // 2]
        return self.splits["train"][middle], self.task.tokenizer.convert_ids_to_tokens(self.rows["train"].ids[middle])

    def execute(self, tell: Callable[[dict[str, Any]], None] = lambda line: None) -> dict[str, Any]:
        """Train, test, save, read back; returns what `metrics.json` holds."""
        accelerator = make_accelerator(self.precision)
        accelerator.wait_for_everyone()  # every process has looked at the output folder before one writes into it
        if accelerator.is_main_process:
            self._write_inputs()
        accelerator.wait_for_everyone()
        options = self.recipe.training
        self.model.to(accelerator.device)
        fitted = fit(
            self.model, self.task, self.rows["train"], self.rows["validation"], options, accelerator, self.output,
            tell=tell, resume=self.resume,
        )  # fmt: skip
        test = self.rows["test"]
        probabilities = predict(self.model, self.task, test.ids, options.batch_size * 2, accelerator, exact=True)
        metrics = self._metrics(fitted, probabilities)
        if accelerator.is_main_process:
            self._write_predictions(probabilities)
            self.model.save_pretrained(self.output / ADAPTER, tokenizer=self.task.tokenizer)
            metrics["read_back"] = self._read_back()
            _write_json(self.output / METRICS, metrics)
            write_report(self.output)
        accelerator.wait_for_everyone()
        return metrics

    # --- what is written

    def _write_inputs(self) -> None:
        if self.overwrite and not self.resume and (self.output / RECIPE).is_file():
            for name in (RECIPE, METRICS, PREDICTIONS, REPORT, "log.jsonl"):
                (self.output / name).unlink(missing_ok=True)
            for name in (ADAPTER, DATA, "checkpoints"):
                shutil.rmtree(self.output / name, ignore_errors=True)
        (self.output / DATA).mkdir(parents=True, exist_ok=True)
        for name, examples in self.splits.items():
            columns = [self.recipe.data.text, self.recipe.data.label, "line"]
            write_csv(self.output / DATA / f"{name}.csv", columns, [(e.text, e.label, e.line) for e in examples])
        report = {
            "file": self.recipe.data.file,
            **asdict(self.cleaned),
            **self.found,
            "splits": {name: {"rows": len(self.splits[name]), "classes": self.classes(name)} for name in SPLITS},
            "truncated": self.encoded.truncated,
            "max_length": self.encoded.max_length,
        }
        _write_json(self.output / DATA / "data_report.json", report)
        head = "# The whole run. To repeat it: afina train recipe.yaml --output ANOTHER_FOLDER\n"
        labels = "".join(f"#   {i}  {json.dumps(label, ensure_ascii=False)}\n" for i, label in enumerate(self.task.labels))
        text = f"{head}# Classes, in the order of the model's outputs:\n{labels}{self.recipe.to_yaml()}"
        write_atomically(self.output / RECIPE, lambda path: path.write_text(text, encoding="utf-8"))

    def _write_predictions(self, probabilities: np.ndarray) -> None:
        labels = self.task.labels
        data = self.recipe.data
        columns = ["line", data.text, data.label, "answer", "right", *(f"p({label})" for label in labels)]
        rows = []
        for example, row in zip(self.splits["test"], probabilities, strict=True):
            answer = labels[int(row.argmax())]
            right = "yes" if answer == example.label else "no"
            rows.append((example.line, example.text, example.label, answer, right, *(f"{p:.6f}" for p in row)))
        write_csv(self.output / PREDICTIONS, columns, rows)

    def _metrics(self, fitted: Fitted, probabilities: np.ndarray) -> dict[str, Any]:
        trainable, total = self.model.get_nb_trainable_parameters()
        texts = {name: [e.text for e in self.splits[name]] for name in ("train", "test")}
        test = self.rows["test"].targets
        return {
            "test": self.task.metrics(probabilities, test),
            "validation": fitted.validation,
            "baselines": self.task.baselines(texts["train"], self.rows["train"].targets, texts["test"], test),
            "train": {
                "seconds": round(fitted.seconds, 2),
                "steps": fitted.steps,
                "best_epoch": fitted.best_epoch,
                "tokens": fitted.tokens,
                "tokens_per_second": round(fitted.tokens / fitted.seconds, 1),
                "peak_memory_bytes": fitted.peak_memory_bytes,
                "trainable_parameters": trainable,
                "total_parameters": total,
                "precision": self.precision,
                "threads": torch.get_num_threads(),
            },
            "versions": _versions(),
        }

    @torch.no_grad()
    def _read_back(self) -> dict[str, float]:
        """Load what was written into a fresh base and compare on the longest test rows.

        Raises CheckpointError where the answers differ by more than rounding.
        """
        device = next(self.model.parameters()).device
        fresh_task = SequenceClassification(self.task.labels, load_tokenizer(self.source, self.output / ADAPTER))
        fresh = PeftModel.from_pretrained(
            fresh_task.load_model(self.source.path), self.output / ADAPTER, tokenizer=fresh_task.tokenizer
        ).to(device)
        chosen = sorted(range(len(self.splits["test"])), key=lambda i: -len(self.rows["test"].ids[i]))[:8]
        length, folder = self.encoded.max_length, self.output / ADAPTER
        ids = fresh_task.encode([self.splits["test"][i].text for i in chosen], length, length).ids
        if ids != [self.rows["test"].ids[i] for i in chosen]:
            raise CheckpointError(f"{folder}: the tokenizer that was written splits texts differently when read back")
        batch = {k: v.to(device) for k, v in self.task.collate(ids).items()}
        answers = [torch.softmax(self.task.logits(m.eval(), batch).double(), -1) for m in (self.model, fresh)]
        difference = float((answers[0] - answers[1]).abs().max())
        if not difference <= _TOLERANCE:
            raise CheckpointError(
                f"{folder}, read back, does not answer as the model that was trained: probabilities differ by up to "
                f"{difference:.2g}. Do not use it, and please report this"
            )
        return {"rows": len(chosen), "largest_difference": difference}


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


def _check_truncation(encoded: Encoded, recipe: Recipe, spell: Callable[[str], str], limit: int) -> None:
    share = encoded.truncated / len(encoded.ids)
    if share > recipe.training.max_truncated:
        cure = (
            f"raise {spell('training.max_length')} (the model takes up to {limit})"
            if encoded.max_length < limit
            else "shorten the texts or take a model for longer ones"
        )
        raise DataError(
            f"{encoded.truncated} of {len(encoded.ids)} texts ({share:.0%}) are longer than {encoded.max_length} tokens and "
            f"would be cut off; {spell('training.max_truncated')} allows {recipe.training.max_truncated:.0%}: {cure}, or "
            "allow more"
        )


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
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)

    write_atomically(path, write)
