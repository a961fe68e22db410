"""Encoded rows on the disk: made once for the same rows, tokenizer and task, and read from there without filling memory.

Features are kept as flat arrays, one file a key, mapped into memory: a token takes 4 bytes and none of them is loaded before
it is read. The name of an entry is a hash of all that its content follows from, code and versions too, so there is nothing
to invalidate. Entries lie in AFINA_CACHE, else in the user's cache folder; AFINA_CACHE=off keeps none. The least recently
used go first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import afina.tasks
from afina.core.files import cache_folder
from afina.core.vocabulary import tokenizer_hash
from afina.data.example import Example
from afina.tasks.task import Encoded, Feature, Task

__all__ = ["Part", "Stored", "encoded_once"]

_KEPT = 20  # entries
_FORM = 1  # of the files; another number makes all entries new
_ABSENT = -(2**31)


class Stored(Sequence[Feature]):
    """Features in arrays: whole numbers, lists of them, and anything else as JSON."""

    def __init__(self, length: int, columns: dict[str, tuple[str, list[np.ndarray]]]):
        self.length, self.columns = length, columns

    @classmethod
    def of(cls, features: Sequence[Feature]) -> Stored:
        """The same features, packed; a key that a feature lacks stays absent."""
        columns: dict[str, tuple[str, list[np.ndarray]]] = {}
        for key in dict.fromkeys(key for feature in features for key in feature):
            values = [feature.get(key) for feature in features]
            given = [value for value in values if value is not None]
            if len(given) == len([f for f in features if key in f]) and all(type(v) is int for v in given):
                packed = [np.array([_ABSENT if v is None else v for v in values], dtype=np.int64)]
                columns[key] = ("number", packed)
            elif len(given) == len(values) and all(type(v) is list and all(type(x) is int for x in v) for v in given):
                columns[key] = ("list", _flat(given, np.int32))
            else:
                texts = [json.dumps(f[key], ensure_ascii=False).encode() if key in f else b"" for f in features]
                columns[key] = ("json", _flat([list(text) for text in texts], np.uint8))
        return cls(len(features), columns)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(index)
        i = index % self.length
        feature: Feature = {}
        for key, (kind, arrays) in self.columns.items():
            if kind == "number":
                if (number := int(arrays[0][i])) != _ABSENT:
                    feature[key] = number
                continue
            part = arrays[0][arrays[1][i] : arrays[1][i + 1]]
            if kind == "list":
                feature[key] = part.tolist()
            elif len(part):
                feature[key] = json.loads(part.tobytes())
        return feature

    def write(self, folder: Path) -> None:
        """Into a folder that is there."""
        names = {}
        for n, (key, (kind, arrays)) in enumerate(self.columns.items()):
            names[key] = [kind, len(arrays)]
            for m, array in enumerate(arrays):
                np.save(folder / f"{n}-{m}.npy", array)
        (folder / "features.json").write_text(json.dumps({"length": self.length, "columns": names}), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Stored:
        """Mapped, not loaded."""
        about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
        columns = {}
        for n, (key, (kind, count)) in enumerate(about["columns"].items()):
            mapped = [np.load(folder / f"{n}-{m}.npy", mmap_mode="r", allow_pickle=False) for m in range(count)]
            columns[key] = (kind, mapped)
        return cls(about["length"], columns)


class Part(Sequence[Feature]):
    """Some of the features, in order; their rows count from `first`."""

    def __init__(self, features: Sequence[Feature], chosen: Sequence[int], first: int):
        self.features, self.chosen, self.first = features, chosen, first

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        feature = self.features[self.chosen[index]]
        return {**feature, "row": feature["row"] - self.first}


def encoded_once(task: Task, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
    """What `task.encode` gives, from the cache where it has been made before. Raises what `task.encode` raises."""
    place = cache_folder("encoded")
    if place is None or task.reads_files:  # which are not worth keeping a list of
        return task.encode(examples, max_length, limit)
    entry = place / _key(task, examples, max_length, limit)
    with suppress(OSError, ValueError, KeyError):  # an entry that cannot be read is made again
        made = _read(entry)
        os.utime(entry)
        return made
    encoded = task.encode(examples, max_length, limit)
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        return _written(entry, encoded)
    return encoded


def _read(entry: Path) -> Encoded:
    about = json.loads((entry / "encoded.json").read_text(encoding="utf-8"))
    return Encoded(Stored.read(entry), about["truncated"], about["max_length"], about["notes"])


def _written(entry: Path, encoded: Encoded) -> Encoded:
    beside = entry.with_name(f".{entry.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    Stored.of(encoded.features).write(beside)
    about = {"truncated": encoded.truncated, "max_length": encoded.max_length, "notes": encoded.notes}
    (beside / "encoded.json").write_text(json.dumps(about), encoding="utf-8")
    shutil.rmtree(entry, ignore_errors=True)
    try:
        beside.rename(entry)
    except OSError:  # another process has just written the same
        shutil.rmtree(beside, ignore_errors=True)
    entries = sorted((p for p in entry.parent.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for old in entries[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return _read(entry)


def _key(task: Task, examples: Sequence[Example], max_length: int | None, limit: int) -> str:
    tokenizer = task.tokenizer
    about = [_FORM, _code(), task.settings(), max_length, limit, tokenizer_hash(tokenizer), type(tokenizer).__name__,
             tokenizer.model_max_length, getattr(tokenizer, "chat_template", None)]  # fmt: skip
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for changing in ("truncation", "padding"):  # as the last call left them
        rules.pop(changing, None)
    digest = hashlib.sha256(json.dumps([about, rules], sort_keys=True, default=str).encode())
    for example in examples:
        digest.update(json.dumps([example.text, example.label, example.value, example.row], default=repr).encode())
    return digest.hexdigest()[:32]


@cache
def _code() -> str:
    """What encodes: the files of the tasks, and the versions of the libraries below them."""
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    for file in sorted(Path(afina.tasks.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _flat(values: Sequence[Sequence[int]], kind: Any) -> list[np.ndarray]:
    ends = np.cumsum([0, *(len(value) for value in values)], dtype=np.int64)
    flat = np.empty(int(ends[-1]), dtype=kind)
    for value, start, end in zip(values, ends, ends[1:], strict=False):
        flat[start:end] = value
    return [flat, ends]
