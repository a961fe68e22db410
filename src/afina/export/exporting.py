"""The common way of every export: the run answers golden prompts, its model is merged and converted beside the place where
the artefact will be, the artefact answers the same prompts through its own runtime, and only then it is moved there.

What is refused leaves nothing behind. Models are let go as soon as the next step does not need them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from afina.core.dequantise import dequantised
from afina.core.files import write_atomically
from afina.core.merge_error import OutputError, difference, outputs_of, rounding
from afina.data.example import Example
from afina.data.read import read_table
from afina.errors import CheckpointError, ConfigError, MergeError, Problems
from afina.export.format import Settings, Source
from afina.export.formats import FORMATS, find_format
from afina.export.golden import Replay, chosen, keep_files, read_golden, record, replay, write_golden
from afina.export.measures import Speed, alternated, drop, figures_of, with_references
from afina.export.merged import asked_dtype, read_merged, write_merged
from afina.memory.storage import FLOATS, Storage, stored_as
from afina.model import PeftModel
from afina.tasks.catalogue import find_task, task_from_settings
from afina.tasks.task import Encoded, Figure
from afina.training.models import find_model, load_config, load_processor
from afina.training.recipe import read_recipe
from afina.training.trained import TrainedRun

__all__ = ["Exported", "export", "verify"]

REPORT = "export.json"
_COMPARED = 32  # features whose outputs are compared where a quantised base is merged
Tell = Callable[[str], None]


@dataclass
class Exported:
    """What was written and how it compares with the run's model."""

    folder: Path
    format: str
    bytes: int
    merged_bytes: int
    replay: Replay
    figures: dict[str, tuple[float, float]] = field(default_factory=dict)  # before and after, on the validation rows
    rows: int = 0  # of the validation split
    speed: Speed | None = None
    notes: list[str] = field(default_factory=list)
    titles: dict[str, Figure] = field(default_factory=dict)

    def shown(self) -> list[tuple[str, str, str]]:
        """Figures as a person reads them: title, of the run, of the artefact."""
        return [(f.title, f.shown(self.figures[k][0]), f.shown(self.figures[k][1])) for k, f in self.titles.items()]


@dataclass
class _Known:
    """What the run's model answered, kept when it is let go."""

    golden: dict[str, Any]
    examples: list[Example]
    encoded: Encoded
    figures: dict[str, Any]
    best: str


def export(
    run: Path, name: str, output: Path | None, settings: Settings, *, overwrite: bool = False, tell: Tell = lambda line: None
) -> Exported:
    """Write the run in a format. Raises ConfigError where that cannot be, MergeError where merging changes the answers,
    CheckpointError where the artefact answers otherwise; nothing is left then."""
    made = find_format(name)
    output = output or run / "exports" / name
    _check_output(output, overwrite)
    dtype = asked_dtype(settings.dtype)
    trained = TrainedRun.load(run)
    if trained.task.pipelines != made.pipelines:
        fitting = ", ".join(name for name, other in FORMATS.items() if other.pipelines == trained.task.pipelines)
        raise ConfigError(f"--format {name}: {run} is a run of {trained.task.name}, which is exported as {fitting}")
    settings = replace(settings, stored=trained.task.storage.weights)
    _check_base(settings)
    measured = made.rounds(settings) or (settings.quantised and made.merged)
    made.check(trained.task, trained.model.get_base_model().config, settings)
    if made.merged:
        _check_mergeable(trained)
    tell("asking the model of the run")
    known = _ask(trained, measured=measured)
    task, model = trained.task, trained.model
    output.parent.mkdir(parents=True, exist_ok=True)
    with _beside(output) as (work, artefact):
        notes: list[str] = []
        if made.merged:
            del trained, model
            gc.collect()
            tell("merging")
            notes = _merge(run, known, work, settings, dtype)
        else:
            del trained, model
        source = Source(work, run, task, settings, notes)
        merged_bytes = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
        tell(f"writing {made.name}")
        before = read_merged(work) if made.timed else None
        made.write(source, artefact)
        keep_files(task, known.golden, artefact)
        tell("asking what was written")
        replayed, loaded, own = replay(made, artefact, known.golden, settings)
        done = Exported(output, name, made.weights(artefact), merged_bytes, replayed, notes=source.notes)
        if measured:
            _measure(done, known, own, loaded, before, settings)
        golden = {**known.golden, "format": name, "settings": _said(settings)}
        for prompt, answer in zip(golden["prompts"], replayed.answers, strict=True):
            prompt["artefact"] = answer
        write_golden(artefact, golden)
        _write_report(artefact, done)
        del loaded, before
        if output.exists():
            shutil.rmtree(output)
        os.replace(artefact, output)
    return done


def verify(folder: Path) -> tuple[Replay, str]:
    """Ask an artefact its golden prompts again; returns what came of it and the name of its format.

    Raises CheckpointError where a file has changed or an answer is another.
    """
    golden = read_golden(folder)
    made = find_format(str(golden.get("format")))
    known = {key: value for key, value in golden["settings"].items() if key in Settings.__dataclass_fields__}
    replayed, _, _ = replay(made, folder, golden, Settings(**known), repeat=True)
    return replayed, made.name


# --- before


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_file():
        raise ConfigError(f"--output {output} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise ConfigError(f"--output {output} exists and is not empty; take another folder, or add --overwrite")
        if not (output / "golden.json").is_file():
            raise ConfigError(f"--output {output} holds no export of afina, so --overwrite does not touch it; take another")


def _check_base(settings: Settings) -> None:
    stored = settings.stored
    if settings.base is not None and settings.base not in ("quantised", "pristine"):
        raise ConfigError(f"--base {settings.base}: expected quantised or pristine")
    if settings.base is not None and not settings.quantised:
        raise ConfigError(f"--base {settings.base}: the base of this run is not quantised ({stored}); leave --base out")


def _check_mergeable(trained: TrainedRun) -> None:
    adapters = trained.model.adapters
    try:
        adapters.check_mergeable(adapters.active)
    except MergeError as error:
        raise MergeError(
            f"{error}\nNo format that holds one merged model can be made of this run. `afina predict` and `afina serve` "
            "answer with it as it is; a method that can be merged (`afina methods`) can be exported"
        ) from None


def _ask(trained: TrainedRun, *, measured: bool) -> _Known:
    """Golden prompts of the validation rows; with `measured` the figures of all of them."""
    examples = _validation(trained)
    task, base = trained.task, trained.model.get_base_model()
    limit = task.limit(base)
    length = trained.recipe.training.max_length or limit
    model = trained.model.to("cpu").eval()
    golden = record(model, task, chosen(task, examples, length, limit), length, limit)
    golden |= {"base": trained.recipe.model, "weights": task.storage.weights}
    encoded = task.encode(examples, length, limit)
    if measured and task.refers:  # what was made has no reference any more
        encoded.features = with_references(model, task, encoded.features)
    figures = figures_of(model, task, examples, encoded.features) if measured else {}
    return _Known(golden, examples, encoded, figures, trained.recipe.training.best or next(iter(task.figures)))


def _validation(trained: TrainedRun) -> list[Example]:
    path = trained.folder / "data" / "validation.csv"
    if not path.is_file():
        raise CheckpointError(f"{path} is absent; its rows are what an export is compared on")
    names = trained.columns
    rows = read_table(path, set(names.values()))
    problems = Problems(str(path))
    for name in names.values():
        if missing := rows.missing(name):
            problems.add(missing)
    problems.raise_as(CheckpointError)
    examples = trained.examples([{role: row[n] for role, n in names.items()} for row in rows.rows], rows.lines)
    labelled = trained.task.kind.labels != "none"
    usable = [e for e in examples if e.text and (e.label or not labelled)]
    if not usable:
        raise CheckpointError(f"{path} has no row to compare on")
    return usable


@contextlib.contextmanager
def _beside(output: Path) -> Iterator[tuple[Path, Path]]:
    """Two empty folders beside the output, for the merged model and for the artefact; gone afterwards."""
    place = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
    work, artefact = place / "merged", place / "artefact"
    try:
        work.mkdir(parents=True)
        artefact.mkdir()
        yield work, artefact
    finally:
        gc.collect()
        shutil.rmtree(place, ignore_errors=True)


# --- merging


def _merge(run: Path, known: _Known, work: Path, settings: Settings, dtype: torch.dtype | None) -> list[str]:
    """The merged model into `work`; returns what is to be told of it.

    Over a base in floating point: in the type of the checkpoint, from which it is read as it is walked. Over a quantised
    one: onto the values that its weights stand for, or onto the checkpoint's own; both are compared with the run's model
    (T18).
    """
    if not settings.quantised:
        fresh = _reload(run)
        write_merged(fresh.model, fresh.task, work, dtype=dtype)
        return []
    torch.manual_seed(0)  # of a head that only the adapter has values for
    trained = TrainedRun.load(run)
    base = settings.base or "quantised"
    task, model = trained.task, trained.model.to("cpu").eval()
    seen = known.encoded.features[:_COMPARED]
    batches = [_inputs(task.collate([{**f, "row": 0}])) for f in seen]
    apart = outputs_of(model, batches, _outputs)
    with model.disable_adapter():
        alone = outputs_of(model, batches, _outputs)
    said = {"stored again": str(rounding(model.adapters)).splitlines()[0]}
    found: dict[str, OutputError] = {}
    if base == "quantised":
        write_merged(model, task, work, dtype=dtype)
        del trained, model
        gc.collect()
        found[base] = difference(outputs_of(read_merged(work), batches, _outputs), apart, alone)
    else:
        dequantised(model.get_base_model())
        found["quantised"] = difference(outputs_of(model, batches, _outputs), apart, alone)
        del trained, model
        gc.collect()
    if stored_as(load_config(find_model(read_recipe(run / "recipe.yaml").model))) is None:
        pristine = _reload(run)
        found["pristine"] = difference(outputs_of(pristine.model.eval(), batches, _outputs), apart, alone)
        if base == "pristine":
            write_merged(pristine.model, pristine.task, work, dtype=dtype)
        del pristine
    elif base == "pristine":
        raise ConfigError("--base pristine: the checkpoint itself is quantised and has no other weights; leave --base out")
    titles = {"quantised": f"onto what the {settings.stored} weights stand for", "pristine": "onto the checkpoint's own"}
    notes = [
        f"merged {titles[key]} (--base {key}): outputs differ by {one.error:.2%} from the run's, which is "
        f"{one.lost or 0:.1%} of what the adapter does; the same first choice at {one.agreement:.1%} of {one.positions} "
        f"places{'; this is what was taken' if key == base else ''}"
        for key, one in found.items()
    ]
    notes.append(f"merged and stored in {settings.stored} again it would be: {said['stored again']}")
    lost = found[base].lost or 0.0
    if lost > settings.max_error:
        other = next((key for key in found if key != base), None)
        cure = f"accept it with --max-error {math.ceil(lost * 100) / 100:.2f}"
        cure = f"take --base {other}, or {cure}" if other else cure
        raise MergeError(
            f"merging loses {lost:.0%} of what the adapter does, --max-error allows {settings.max_error:.0%} (T17, T18). "
            "Nothing was written.\n" + "\n".join(f"  {note}" for note in notes) + f"\nTo go on, {cure}"
        )
    return notes


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch the model itself reads."""
    names = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "pixel_values", "input_values",
             "input_features")  # fmt: skip
    return {name: batch[name] for name in names if name in batch}


def _outputs(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Scores, or hidden states where there are none."""
    said = model(**batch)
    if "start_logits" in said:
        return torch.stack([said.start_logits, said.end_logits], dim=1)
    return said.logits if "logits" in said else said.last_hidden_state  # type: ignore[no-any-return]


def _reload(run: Path) -> TrainedRun:
    """The run again, on a base in the type its checkpoint has: nothing is converted, so nothing is read before its turn."""
    recipe = read_recipe(run / "recipe.yaml")
    source = find_model(recipe.model)
    settings = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["task"]
    processor = load_processor(source, find_task(settings["name"]).processor_kind, run / "adapter")
    task = task_from_settings(settings, processor, load_config(source))
    own = next((name for name, kind in FLOATS.items() if kind == load_config(source).dtype), "fp32")
    task.storage = Storage(own)
    model = PeftModel.from_pretrained(task.load_model(source.path), run / "adapter", tokenizer=task.tokenizer)
    return TrainedRun(run, recipe, task, model)


# --- after


def _measure(done: Exported, known: _Known, task: Any, loaded: Any, before: Any, settings: Settings) -> None:
    """Figures and speed of the artefact; raises CheckpointError where the figure that chose the weights dropped too far."""
    figures = figures_of(loaded, task, known.examples, known.encoded.features)
    done.rows = len(known.examples)
    done.figures = {key: (value, figures[key]) for key, value in known.figures.items() if key in figures}
    done.titles = {key: task.figures[key] for key in done.figures}
    if before is not None:
        done.speed = alternated(before, loaded, task, known.encoded.features)
    best = known.best if known.best in done.figures else next(iter(done.figures))  # a divergence is measured of a run alone
    figure, (was, now) = task.figures[best], done.figures[best]
    if (lost := drop(figure, was, now)) > settings.max_drop:
        raise CheckpointError(
            f"{figure.title} on the {done.rows} validation rows went from {figure.shown(was)} to {figure.shown(now)}, which "
            f"is {lost:.2%} worse; --max-drop allows {settings.max_drop:.2%}. Nothing was written. Take another format, or "
            "raise --max-drop"
        )


def _said(settings: Settings) -> dict[str, Any]:
    return {key: getattr(settings, key) for key in Settings.__dataclass_fields__}


def _write_report(folder: Path, done: Exported) -> None:
    content = {
        "format": done.format,
        "bytes": done.bytes,
        "merged_bytes": done.merged_bytes,
        "golden": {"prompts": done.replay.prompts, "largest_difference": done.replay.largest, "mean": done.replay.mean},
        "validation": {"rows": done.rows, **{k: {"run": b, "artefact": a} for k, (b, a) in done.figures.items()}},
        "speed": vars(done.speed) | {"ratio": done.speed.ratio} if done.speed else None,
        "notes": done.notes,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / REPORT, lambda path: path.write_text(text, encoding="utf-8"))
