"""Golden prompts: some rows with the model's answers, kept in the artefact and asked of it through its own runtime (T19).

A row is kept with the tokens it became, so that a tokenizer that splits otherwise is told apart from weights that answer
otherwise; of what is no text, with the sizes it is read at. Files that a row names (pictures) are kept in the artefact, so
that it can be asked anywhere. Of each row are kept: `outputs`, the numbers that two equal models agree on; `answer`, what a
person is told, read in one padded batch of all rows; and `continuation`, what a model that writes writes greedily. Each is
kept twice: as the run answered, and as the artefact did when it was made, which it has to repeat later.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from afina import __version__
from afina.core.files import write_atomically
from afina.data.example import Example
from afina.errors import CheckpointError, Problems, shortened
from afina.export.format import Format, Settings
from afina.tasks.catalogue import find_task, task_from_settings
from afina.tasks.task import Batch, Feature, Rows, Task, length_of

__all__ = ["GOLDEN", "Replay", "ask_rows", "chosen", "keep_files", "read_golden", "record", "replay", "write_golden"]

GOLDEN = "golden.json"
FILES = "golden"  # the files that rows name
VERSION = 1
_TOKENS = 24  # written on of a golden prompt
_WINDOWS = 3  # features of one row at most
_OF_EACH = 4  # labels that have a row of their own
_NUMBERS = 4096  # of the outputs of one feature, evenly spread where there are more (pixels)
_EXACT = 1e-3  # where probabilities may differ by more, tokens that are as likely as each other may change places
_MERGED = 0.2  # of probabilities, in the mean, where a quantised base became a floating-point one
_REPEATED = 1e-3  # an artefact repeats its own answers within this
_REPEATED_ROUNDED = 2e-2  # where activations are rounded too, which another CPU does differently


# --- choosing and asking


def chosen(task: Task, examples: Sequence[Example], length: int, limit: int) -> list[tuple[str, Example]]:
    """Some of the rows, and why each: shortest, longest, typical, letters beyond ASCII, one of each of a few labels."""
    features = task.encode(examples, length, limit).features
    tokens = [0] * len(examples)
    for feature in features:
        tokens[feature["row"]] += length_of(feature)
    order = sorted(range(len(examples)), key=lambda i: (tokens[i], i))
    ends = ("shortest", "longest") if tokens[order[0]] < tokens[order[-1]] else ("first", "last")
    found = {ends[0]: order[0], ends[1]: order[-1], "typical": order[len(order) // 2]}
    foreign = [sum(ord(c) > 127 for c in e.text) for e in examples]
    if any(foreign):
        found["letters beyond ASCII"] = max(range(len(examples)), key=lambda i: (foreign[i], -i))
    if task.kind.labels == "class":
        for label in task.labels[:_OF_EACH]:
            rows = [i for i in order if examples[i].label == label]
            if rows:
                found[f"label {label}"] = rows[len(rows) // 2]
    taken: dict[int, str] = {}
    for why, i in found.items():
        taken[i] = f"{taken[i]}, {why}" if i in taken else why
    return [(why, examples[i]) for i, why in taken.items()]


@torch.no_grad()
def ask_rows(model: Any, task: Task, examples: Sequence[Example], features: Sequence[Any], size: int = 32) -> list[Any]:
    """One answer an example, asked on the CPU in batches of rows of like length."""
    rows = Rows(list(examples), features)
    order = sorted(range(len(features)), key=lambda i: rows.lengths[i])
    answers: list[Any] = [None] * len(features)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        made = task.answers(model, task.collate([features[i] for i in batch]))
        for i, answer in zip(batch, made, strict=True):
            answers[i] = answer
    return task.join(answers, rows)


def _short(task: Task) -> Task:
    """The task, for a few greedy tokens."""
    if not hasattr(task.options, "max_new_tokens"):
        return task
    other = copy.copy(task)
    known = {field.name for field in dataclasses.fields(task.options)}
    few = {"max_new_tokens": _TOKENS, "num_beams": 1}
    other.options = dataclasses.replace(task.options, **{key: value for key, value in few.items() if key in known})
    return other


@torch.no_grad()
def _answers(model: Any, task: Task, examples: Sequence[Example], length: int, limit: int) -> list[dict[str, Any]]:
    """What is kept of each example: features, outputs, answer, continuation."""
    task = _short(task)
    features = task.encode(examples, length, limit).features
    own: list[list[Any]] = [[] for _ in examples]
    for feature in features:
        own[feature["row"]].append(feature)
    kept = [{**f, "row": i} for i, fs in enumerate(own) for f in fs[:_WINDOWS]]
    writes = hasattr(task, "ends")
    joined = [None] * len(examples) if writes else ask_rows(model, task, examples, kept, len(kept))
    made = []
    for i, (example, answer) in enumerate(zip(examples, joined, strict=True)):
        windows = [f for f in kept if f["row"] == i]
        batches = [task.collate([{**f, "row": 0}]) for f in windows]
        outputs = [_listed(task.outputs(model, batch)) for batch in batches]
        ids = [_read(f, batch) for f, batch in zip(windows, batches, strict=True)]
        one: dict[str, Any] = {"tokens": ids, "outputs": outputs, "answer": {} if writes else task.respond(answer, example)}
        if writes:
            question = dataclasses.replace(example, label="")
            asked = task.encode([question], task.asked_length(length, limit), limit).features
            (written,) = task.final_answers(model, task.collate(asked))
            one["continuation"] = written.text
        made.append(json.loads(json.dumps(one)))
    return made


def _read(feature: Feature, batch: Batch) -> list[Any]:
    """The token ids of a feature; of what is no text, the sizes that the model reads it at."""
    ids = [feature[key] for key in ("input_ids", "decoder_ids", "pair_ids") if key in feature]
    return ids or [list(values.shape[1:]) for key, values in batch.items() if key != "labels"]


def _listed(values: torch.Tensor) -> list[float]:
    flat = values.flatten()
    return [round(float(v), 6) for v in flat[:: max(1, -(-len(flat) // _NUMBERS))]]


# --- what is kept


def record(model: Any, task: Task, rows: Sequence[tuple[str, Example]], length: int, limit: int) -> dict[str, Any]:
    """Golden prompts with the answers of the model that was trained, and the settings that belong to them."""
    answers = _answers(model, task, [example for _, example in rows], length, limit)
    stops = task.ends(_bare(model)) if hasattr(task, "ends") else []
    settings = task.settings()
    if hasattr(task, "pooling"):
        settings["options"]["pooling"] = task.pooling
    return {
        "version": VERSION,
        "made_by": f"afina {__version__}",
        "task": settings,
        "length": length,
        "limit": limit,
        "chat_template": _template(task.processor),
        "stop_tokens": {str(task.tokenizer.convert_ids_to_tokens(stop)): stop for stop in stops},
        "prompts": [
            {"why": why, "row": dict(example.row), "line": example.line, "run": answer}
            for (why, example), answer in zip(rows, answers, strict=True)
        ],
    }


def keep_files(task: Task, golden: dict[str, Any], folder: Path) -> None:
    """Copy the files that the prompts name into the artefact; the prompts name the copies from then on."""
    for i, prompt in enumerate(golden["prompts"]):
        for role in task.kind.media.keys() & prompt["row"].keys():
            if path := prompt["row"][role]:
                kept = Path(FILES) / f"{i}-{role}{Path(path).suffix}"
                (folder / FILES).mkdir(exist_ok=True)
                shutil.copyfile(path, folder / kept)
                prompt["row"][role] = kept.as_posix()


def _with_paths(task: Task, folder: Path, row: Mapping[str, str]) -> dict[str, str]:
    """A row whose files are found from here."""
    return {role: str(folder / text) if text and role in task.kind.media else text for role, text in row.items()}


def _template(processor: Any) -> str | None:
    """The chat template of a tokenizer, or of what holds one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return getattr(tokenizer, "chat_template", None)


def _bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def write_golden(folder: Path, golden: Mapping[str, Any]) -> None:
    """golden.json, with a checksum of every file beside it."""
    content = {**golden, "files": _checksums(folder)}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / GOLDEN, lambda path: path.write_text(text, encoding="utf-8"))


def _checksums(folder: Path) -> dict[str, str]:
    left = (GOLDEN, "export.json", "README.md")
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in left)
    found = {}
    for path in paths:
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_golden(folder: Path) -> dict[str, Any]:
    """What `write_golden` wrote; raises CheckpointError."""
    try:
        golden = json.loads((folder / GOLDEN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}") from None
        here = shortened(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{folder} holds no {GOLDEN}, so it is no export of afina; it holds {here}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / GOLDEN} cannot be read: {error}") from None
    if golden.get("version") != VERSION:
        raise CheckpointError(f"{folder / GOLDEN} is of version {golden.get('version')}; this afina reads version {VERSION}")
    return golden  # type: ignore[no-any-return]


# --- asking again


@dataclass
class Replay:
    """What came of it: the largest and the mean difference of outputs from the run's, and continuations that are equal."""

    prompts: int
    largest: float
    mean: float
    same_text: int
    texts: int
    answers: list[dict[str, Any]]

    def said(self) -> str:
        """In a sentence."""
        text = f", {self.same_text} of {self.texts} continuations equal" if self.texts else ""
        how = f"largest difference {self.largest:.2g}, mean {self.mean:.2g}" if self.largest > 1e-6 else "no difference"
        return f"{self.prompts} golden prompts: {how}{text}"


def replay(
    made: Format, folder: Path, golden: Mapping[str, Any], settings: Settings, *, repeat: bool = False
) -> tuple[Replay, Any, Task]:
    """Ask the artefact the golden prompts; returns what came of it, the loaded artefact and its task.

    With `repeat` the artefact must also be as it was when it was made: its files, and its own answers. Raises
    CheckpointError that shows the first prompt with another answer.
    """
    problems = Problems(f"{folder} does not answer as it should")
    if repeat:
        _check_files(folder, golden, problems)
        problems.raise_as(CheckpointError, "Export the run again, or take an untouched copy.")
    try:
        processor = made.processor(folder, find_task(golden["task"]["name"]).processor_kind)
        task = task_from_settings(golden["task"], processor, made.config(folder))
        model = made.load(folder, task)
    except Exception as error:  # libraries raise kinds of their own for a broken file
        problems.add(f"it cannot be read: {str(error).strip()[:500]}")
        problems.raise_as(CheckpointError)
        raise
    _check_template(made, folder, task, golden, problems)
    if golden["stop_tokens"]:
        missing = [t for t, i in golden["stop_tokens"].items() if i not in made.stops(model)]
        if missing:
            problems.add(f"it does not stop at {', '.join(missing)}, where the run's model does")
    problems.raise_as(CheckpointError)
    given = [_with_paths(task, folder, prompt["row"]) for prompt in golden["prompts"]]
    rows = [task.kind.make(row, prompt["line"]) for row, prompt in zip(given, golden["prompts"], strict=True)]
    rows = [dataclasses.replace(e, row=row) for e, row in zip(rows, given, strict=True)]
    answers = _answers(model, task, rows, golden["length"], golden["limit"])
    largest, differences, same = 0.0, list[float](), 0
    rounding, loose = made.tolerance(folder, settings), made.rounds(settings) or settings.quantised
    if settings.quantised:  # what may be lost was measured when it was merged
        rounding = max(rounding, _MERGED)
    exact = not loose and rounding <= _EXACT
    repeated = _REPEATED_ROUNDED if loose else max(_REPEATED, rounding)
    for prompt, answer in zip(golden["prompts"], answers, strict=True):
        different = _differences(prompt["run"]["outputs"], answer["outputs"])
        largest, differences = max(largest, *different), [*differences, sum(different) / len(different)]
        same += answer.get("continuation") == prompt["run"].get("continuation")
        problem = _problem(prompt["run"], answer, math.inf if loose else rounding, exact=exact)
        if problem is None and repeat:
            problem = _problem(prompt["artefact"], answer, repeated, exact=exact)
        if problem is not None:
            problems.add(_shown(prompt, problem))
            break
    mean = sum(differences) / len(differences)
    if not problems.found and loose and not mean <= rounding:
        problems.add(f"its probabilities are {mean:.2g} from those of the run in the mean, where {rounding:.2g} is allowed")
        problems.raise_as(CheckpointError, made.cure())
    problems.raise_as(CheckpointError)
    texts = sum(prompt["run"].get("continuation") is not None for prompt in golden["prompts"])
    same = same if texts else 0
    return Replay(len(answers), largest, mean, same, texts, answers), model, task


def _check_files(folder: Path, golden: Mapping[str, Any], problems: Problems) -> None:
    here, then = _checksums(folder), golden["files"]
    for name in sorted(then):
        if name not in here:
            problems.add(f"{name} is missing")
        elif here[name] != then[name]:
            problems.add(f"{name} is not the file that was written")
    for name in sorted(set(here) - set(then)):
        problems.add(f"{name} was not written by the export")


def _check_template(made: Format, folder: Path, task: Task, golden: Mapping[str, Any], problems: Problems) -> None:
    """A task puts its own template into the tokenizer: what is inside the artefact is read apart."""
    inside = _template(made.processor(folder, task.processor_kind))
    if inside != golden["chat_template"]:
        found = "none" if inside is None else f"{inside[:80]!r}"
        problems.add(f"the chat template inside it is {found}, where the run's is {str(golden['chat_template'])[:80]!r}")


def _differences(one: Any, other: Any) -> list[float]:
    """Of numbers in lists of like shape; infinite where the shapes differ."""
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return [math.inf]
        return [d for a, b in zip(one, other, strict=True) for d in _differences(a, b)] or [0.0]
    difference = abs(float(one) - float(other))
    return [difference if difference == difference else math.inf]


def _problem(then: Mapping[str, Any], now: Mapping[str, Any], tolerance: float, *, exact: bool) -> str | None:
    """What of an answer is another, in words; None where nothing is."""
    if then["tokens"] != now["tokens"]:
        return f"it became the tokens {str(now['tokens'])[:120]}, where the run made {str(then['tokens'])[:120]}"
    if (difference := max(_differences(then["outputs"], now["outputs"]))) > tolerance:
        return f"probabilities differ by up to {difference:.2g} (allowed: {tolerance:.2g})"
    if exact and then.get("continuation") != now.get("continuation"):
        return f"it goes on with {now.get('continuation')!r}, where the run goes on with {then.get('continuation')!r}"
    if exact and (other := _apart(then["answer"], now["answer"], 10 * tolerance)):
        return f"the answer differs: {other}"
    return None


def _apart(then: Any, now: Any, tolerance: float) -> str | None:
    """Where two answers differ; numbers may by `tolerance`, of their size where they are larger than 1."""
    if isinstance(then, Mapping) and isinstance(now, Mapping) and _like(then, now):
        keys = {**then, **now}
        return next((found for key in keys if (found := _apart(then.get(key, 0.0), now.get(key, 0.0), tolerance))), None)
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return next((found for a, b in zip(then, now, strict=True) if (found := _apart(a, b, tolerance))), None)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (then, now))
    if numbers and abs(then - now) <= tolerance * max(1.0, abs(then)):
        return None
    return None if then == now else f"{str(now)[:80]} for {str(then)[:80]}"


def _like(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two mappings have the same keys, or hold shares, of which those that are nothing are left out."""
    return set(one) == set(other) or all(isinstance(v, float) for v in (*one.values(), *other.values()))


def _shown(prompt: Mapping[str, Any], problem: str) -> str:
    texts = "; ".join(f"{role}: {str(text)[:200]!r}" for role, text in prompt["row"].items() if text)
    return f"golden prompt ({prompt['why']}) {texts}\n    {problem}"
