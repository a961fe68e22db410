"""Reads a folder as FUNSD lays it out: `annotations/NAME.json` beside `images/NAME.png`, below folders of sides or not.

An annotation lists the fields of a form, each with a label (header, question, answer, other) and its words with their boxes
in pixels. A field becomes an entity: B- at its first word, I- at the others; the words of `other` are O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.data.media import SIDES
from afina.data.pictures import ENDINGS
from afina.data.table import Table
from afina.errors import DataError, Problems, shortened

__all__ = ["read_funsd"]

PAGES = "annotations"
_WRONG = 5  # files named in an error
_NAMED = ("train", "metadata")  # files whose tables are read by others
_NONE = "other"  # the label of a field that is none


def read_funsd(path: Path) -> Table | None:
    """A row a page: `words`, `boxes`, `labels` as JSON, `image`. None for files, and for folders with a table in them.

    Raises DataError with every file that is not as it should be, and for a folder in another form.
    """
    if not path.is_dir():
        return None
    below = {p: SIDES.get(p.name.lower().removesuffix("_data")) for p in sorted(path.glob("*/")) if (p / PAGES).is_dir()}
    places: dict[Path, str | None] = {path: None} if (path / PAGES).is_dir() else below
    if not places:
        if any(p.stem.lower() in _NAMED for p in path.iterdir() if p.is_file()):
            return None
        here = shortened(sorted(p.name for p in path.iterdir())) or "nothing"
        raise DataError(
            f"{path} is a folder that holds {here}; expected annotations and images (as in FUNSD), below train and test or "
            "not, or train.jsonl, test.jsonl with the columns words, boxes, labels and perhaps image"
        )
    problems = Problems(str(path))
    if unknown := [p.name for p, side in places.items() if side is None and p != path]:
        problems.add(f"the folders {shortened(unknown)} are no side; expected training_data, testing_data, validation_data")
    columns = ["words", "boxes", "labels", "image"]
    sides: list[str] | None = [] if path not in places else None
    table = Table(
        path, columns, [], [], "", "utf-8", text="words", boxes="boxes", label="labels", image="image", sides=sides,
        nested=dict.fromkeys(columns[:3], "each row is a list"),
    )  # fmt: skip
    empty = 0
    for place, side in places.items():
        for file in sorted((place / PAGES).glob("*.json")):
            name = file.relative_to(path).as_posix()
            picture = next((p for e in ENDINGS if (p := place / "images" / f"{file.stem}{e}").is_file()), None)
            if picture is None:
                problems.add(f"{name} has no picture {(place / 'images').relative_to(path).as_posix()}/{file.stem}.png")
                continue
            try:
                words, boxes, tags, without = _page(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, RecursionError) as error:
                problems.add(f"{name}: {error}")
                continue
            empty += without
            lists = (json.dumps(values, ensure_ascii=False) for values in (words, boxes, tags))
            table.rows.append([*lists, str(picture.absolute())])
            table.lines.append(name)
            if table.sides is not None:
                table.sides.append(str(side))
    more = len(problems.found) - _WRONG
    del problems.found[_WRONG:]
    problems.raise_as(DataError, f"{more} more files are like that." if more > 0 else "")
    if not table.rows:
        raise DataError(f"{path}: its folder annotations holds no .json")
    if empty:
        table.notes.append(f"{empty} words of the annotations are empty and are left out")
    return table


def _page(content: Any) -> tuple[list[str], list[Any], list[str], int]:
    """Words, boxes and tags of a page, and how many of its words are empty."""
    fields = content.get("form") if isinstance(content, Mapping) else None
    if not isinstance(fields, list):
        raise ValueError('expected an object with a list "form"')
    words, boxes, tags, empty = list[str](), list[Any](), list[str](), 0
    for number, field in enumerate(fields):
        own = field.get("words") if isinstance(field, Mapping) else None
        label = field.get("label") if isinstance(field, Mapping) else None
        if not isinstance(own, list) or not isinstance(label, str) or not label.strip():
            raise ValueError(f'form[{number}] has no list "words", or no "label"')
        kind, begun = label.strip().upper(), False
        for word in own:
            if not isinstance(word, Mapping) or not isinstance(word.get("text"), str) or "box" not in word:
                raise ValueError(f'form[{number}]: a word needs "text" and "box", found {json.dumps(word)[:40]}')
            if not word["text"].strip():
                empty += 1
                continue
            words.append(word["text"].strip())
            boxes.append(word["box"])
            tags.append("O" if kind == _NONE.upper() else f"{'I' if begun else 'B'}-{kind}")
            begun = True
    return words, boxes, tags, empty
