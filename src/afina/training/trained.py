"""A finished run, loaded for answering: base, adapter and tokenizer from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afina.data.clean import normalised
from afina.data.example import Example, UnusableError
from afina.data.made import held, in_cell
from afina.data.media import Look, looks_at
from afina.errors import CheckpointError, DataError, Problems, shortened
from afina.memory.storage import Storage
from afina.model import PeftModel
from afina.tasks.catalogue import find_task, task_from_settings
from afina.tasks.reference import REFERENCE
from afina.tasks.task import Rows, Task
from afina.training.loop import make_engine, predict
from afina.training.models import ModelSource, find_model, load_config, load_processor
from afina.training.recipe import Recipe, read_recipe

__all__ = ["TrainedRun"]

_NAMED = 5  # rows named in an error


@dataclass
class TrainedRun:
    """What a run folder answers with."""

    folder: Path
    recipe: Recipe
    task: Task
    model: PeftModel
    truncated: int = 0  # of the examples that were answered last: how many were too long and cut off

    @classmethod
    def load(cls, folder: Path) -> TrainedRun:
        """Raises CheckpointError where the folder is no finished run."""
        recipe, task, source = cls.described(folder)
        model = PeftModel.from_pretrained(task.load_model(source.path), folder / "adapter", tokenizer=task.tokenizer)
        if (folder / REFERENCE).is_dir():
            model.load_adapter(folder / REFERENCE, REFERENCE)
        return cls(folder, recipe, task, model)

    @staticmethod
    def described(folder: Path) -> tuple[Recipe, Task, ModelSource]:
        """Recipe, task and base of a run, without its model. Raises CheckpointError where the folder is no finished run."""
        if not folder.is_dir():
            raise CheckpointError(f"there is no run folder {folder}")
        missing = [name for name in ("recipe.yaml", "adapter", "metrics.json") if not (folder / name).exists()]
        if missing:
            here = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            stopped = (folder / "checkpoints").is_dir() and "recipe.yaml" not in missing
            again = "; this one stopped before the end, `afina train ... --resume` goes on" if stopped else ""
            raise CheckpointError(
                f"{folder} is no finished run: it lacks {', '.join(missing)} and holds {here}. Give the folder that was "
                f"--output of `afina train`{again}"
            )
        recipe = read_recipe(folder / "recipe.yaml")
        try:
            settings = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["task"]
        except (ValueError, KeyError, TypeError) as error:
            cure = "`afina train ... --resume` writes it again from the last checkpoint"
            raise CheckpointError(f"{folder / 'metrics.json'} is broken ({type(error).__name__}: {error}); {cure}") from None
        made = find_task(settings["name"])
        source = find_model(recipe.model, pipeline=made.pipelines)
        processor = load_processor(source, made.processor_kind, folder / "adapter")
        config = load_config(source)
        task = task_from_settings(settings, processor, config)
        task.storage = Storage.of(recipe.memory.weights if recipe.memory.weights != "auto" else "fp32", config)
        return recipe, task, source

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column of the file that it was trained on."""
        named = {role: getattr(self.recipe.data, role) for role in self.task.kind.columns}
        return {role: column for role, column in named.items() if column}

    def examples(self, rows: Sequence[Mapping[str, str]], lines: Sequence[int | str] = ()) -> list[Example]:
        """Rows by role as examples; those without a text have the text "". Raises DataError with what the task refuses."""
        made, problems, wrong = list[Example](), Problems("the rows"), 0
        kind, looks = self.task.kind, dict[str, Look | str]()
        for role, medium in kind.media.items():
            looks |= looks_at([row[role].strip() for row in rows if row.get(role, "").strip()], medium)
        labels = {normalised(label): label for label in self.task.labels} if self.task.kind.labels == "class" else {}
        unknown = set()
        for line, row in zip(lines or range(1, len(rows) + 1), rows, strict=True):
            row = {role: in_cell(text, self.task.kind.columns[role], self.recipe.data.clean) for role, text in row.items()}
            try:
                for role in kind.media:
                    if isinstance(broken := looks.get(row.get(role, "")), str):
                        raise ValueError(f"{row[role]}: {broken}")
                example = kind.make(row, line) if row[kind.input] else Example("", "", line)
                example = replace(example, text=held(example.text, row, kind, looks))
            except UnusableError:
                example = Example("", "", line)
            except ValueError as error:
                wrong += 1
                if wrong <= _NAMED:
                    problems.add(f"line {line}: {error}")
                continue
            if labels and example.label:
                if normalised(example.label) not in labels:
                    unknown.add(example.label)
                example = replace(example, label=labels.get(normalised(example.label), example.label))
            made.append(replace(example, row=row))
        if unknown:
            problems.add(
                f"labels the model does not know: {shortened(sorted(unknown))}. It knows {shortened(self.task.labels)}"
            )
        problems.raise_as(DataError, f"{wrong - _NAMED} more rows are like that." if wrong > _NAMED else "")
        return made

    def asked(self, rows: Sequence[Mapping[str, str]], lines: Sequence[int | str] = ()) -> list[Example]:
        """The same, to be answered: no example says its label."""
        return [replace(example, label="") for example in self.examples(rows, lines)]

    def answers(self, examples: Sequence[Example], batch_size: int = 32) -> list[Any]:
        """One answer an example, in float32; examples have a text."""
        engine = make_engine("fp32")
        limit = self.task.limit(self.model.get_base_model())
        length = self.task.asked_length(self.recipe.training.max_length or limit, limit)
        encoded = self.task.encode(examples, length, limit)
        self.truncated = encoded.truncated
        rows = Rows(list(examples), encoded.features)
        model = self.model.to(engine.device)
        return predict(model, self.task, rows, batch_size, engine, exact=True, final=True)
