"""A tag a word of a scanned page, by what the word is and where it stands: keys and values of forms, amounts of receipts.

LayoutLM and LiLT read words and their boxes, LayoutLMv3 looks at the page too. A piece has the box of its word. What stands
before and after the words has the box that the checkpoints were trained with: the near corner, for LayoutLM's last token
the far one.

A page that is longer than the model reads is cut into windows that share a stretch of words; each word is learned and
answered in the one window where it has most around it, so none is lost and none counts twice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from afina.core.config import option
from afina.data.boxes import GRID, UNITS, Box, read_boxes, read_size
from afina.data.example import Column, Example, Kind
from afina.data.funsd import read_funsd
from afina.data.pictures import PICTURE, picture_size, read_picture
from afina.data.table import Table
from afina.errors import ConfigError, DataError, shortened
from afina.memory.loading import READ_AS_TABLES
from afina.tasks import token_classification
from afina.tasks.batches import padded
from afina.tasks.task import IGNORED, Batch, Encoded, Feature, Rows, Task
from afina.tasks.token_classification import Tagged, TokenClassification, Words
from afina.tasks.words import first_seen, words_of_pieces

__all__ = ["DocumentOptions", "DocumentTokenClassification", "Page"]

_READ = ("layoutlm", "layoutlmv3", "lilt")  # kinds of models that take boxes from 0 to 1000, and install with transformers
_SHARE = 4  # neighbouring windows share a quarter of their pieces where nothing is said
_NEAR = 600  # thousandths that some box of some page reaches beyond, where boxes are what they are said to be
_SHOWN = 5  # rows in an error
_BLANK = (762, 1000)  # pixels of a page that stands for any
_LONG = 1000  # words of such a page


@dataclasses.dataclass
class DocumentOptions:
    """What the boxes are, and how pages are read."""

    boxes: str = option(
        "", "what the numbers of a box are: pixels of the page, or thousandths of its width and height; has to be said",
        choices=("", *UNITS),
    )  # fmt: skip
    clip: bool = option(False, "cut boxes that reach over the edge of the page; false: they are an error")
    pictures: bool = option(True, "look at the picture of a page too, where the model can")
    stride: int | None = option(None, "pieces that neighbouring windows of a long page share; None: a quarter", low=0)


@dataclasses.dataclass(frozen=True)
class Page(Words):
    """The words of a page with their boxes, in thousandths of its width and height."""

    boxes: tuple[Box, ...] = ()
    picture: str | None = ""  # "": no picture is named; None: a blank page that stands for any
    cut: int = 0  # boxes that were cut at the edge


def read_forms(path: Path, unit: str = "") -> Table | None:
    """See `read_funsd`, whose boxes are pixels; raises DataError where the recipe says otherwise."""
    table = read_funsd(path)
    if table is not None and unit == "thousandths":
        raise DataError(f"{path}: boxes in FUNSD's layout are pixels of the page; say task.boxes=pixels")
    return table


def make(row: Mapping[str, str], line: int | str, *, unit: str = "", clip: bool = False) -> Example:
    """Words, boxes and tags, each a list as JSON; words and tags may also be separated by white space."""
    if unit not in UNITS:
        raise ValueError("task.boxes is missing: pixels, or thousandths of the page")
    text = row["text"].strip()
    words = json.dumps(text.split(), ensure_ascii=False) if text and not text.startswith("[") else text
    example = token_classification.make({**row, "text": words}, line)
    if not row.get("boxes", "").strip():
        raise ValueError("it has no boxes; expected a list of [x0, y0, x1, y1], one a word")
    picture = row.get("image", "")
    boxes, cut = read_boxes(row["boxes"], example.value.words, unit, _size(row, picture, unit), clip=clip)
    value = example.value
    page = Page(value.words, value.spans, value.tags, tuple(boxes), picture, cut)
    return dataclasses.replace(example, value=page)


def _size(row: Mapping[str, str], picture: str, unit: str) -> tuple[float, float] | None:
    """Of the page in pixels, as far as the row says it. Raises ValueError where it says two things."""
    if unit != "pixels":
        return None
    said = read_size(row["page_size"].strip()) if row.get("page_size", "").strip() else None
    seen = picture_size(picture) if picture else None
    if said and seen and said != seen:
        raise ValueError(f"the page is said to have {said[0]:g} x {said[1]:g} pixels; its picture has {seen[0]} x {seen[1]}")
    return said or seen


class DocumentTokenClassification(TokenClassification):
    """A tag for every word of a page, from the words and their boxes."""

    name = "document_token_classification"
    kind = Kind(
        columns={
            "text": Column("the words of a page, a list", ("words", "tokens", "text"), structured=True, repair=False),
            "boxes": Column("the box of each word, a list of [x0, y0, x1, y1]", ("boxes", "bboxes", "bbox", "box"),
                            structured=True, repair=False),
            "image": Column("the path of the page's picture", ("image", "image_path", "file_name", "file", "path"),
                            required=False, repair=False, medium=PICTURE),
            "page_size": Column("width and height of the page in pixels, [width, height]",
                                ("page_size", "size", "image_size"), required=False, structured=True, repair=False),
            "label": Column("the tag of each word, a list", ("labels", "tags", "ner_tags", "label"), structured=True,
                            repair=False),
        },
        labels="text",
        make=make,
        read=read_forms,
    )  # fmt: skip
    Options: ClassVar[type] = DocumentOptions
    processor_kind: ClassVar[str] = "document"
    reads_files = True

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(processor, options, learned)
        self.kind = self.kind_for(vars(self.options))
        self.reads_files = processor.pages is not None and self.options.pictures

    @classmethod
    def kind_for(cls, options: Mapping[str, Any]) -> Kind:
        """Rows are made as the options say that boxes are."""
        unit, clip = str(options.get("boxes") or ""), options.get("clip") is True
        return dataclasses.replace(cls.kind, make=partial(make, unit=unit, clip=clip), read=partial(read_forms, unit=unit))

    @classmethod
    def wrong_options(cls, options: Any) -> list[str]:
        """What boxes are cannot be guessed."""
        if options.boxes:
            return []
        return ["boxes is missing: say pixels, or thousandths where they run from 0 to 1000 whatever the size of the page"]

    @classmethod
    def for_base(cls, config: Any) -> type[Task]:
        """Raises ConfigError for a base that takes no boxes, or not these."""
        family = getattr(config, "model_type", None)
        if config is None or family in _READ:
            return cls
        cure = (
            "take LayoutLM (microsoft/layoutlm-base-uncased), LayoutLMv3 (microsoft/layoutlmv3-base) or LiLT "
            "(SCUT-DLVCLab/lilt-roberta-en-base)"
        )
        if family in ("layoutlmv2", "layoutxlm"):
            raise ConfigError(f"a {family} needs detectron2, which has no release for this torch: {cure}")
        raise ConfigError(f"a base of the kind {family} takes no boxes of words from 0 to {GRID}: {cure}")

    @classmethod
    def stand_ins(cls, options: Any) -> list[Example] | None:
        """Two blank pages full of words."""
        words, found = tuple(["the"] * _LONG), []
        spans = tuple((4 * i, 4 * i + 3) for i in range(_LONG))
        boxes = tuple((i % 10 * 100, i // 10 * 10, i % 10 * 100 + 90, i // 10 * 10 + 9) for i in range(_LONG))
        for line, tags in enumerate((("O", "B-FIRST"), ("B-SECOND", "O")), 1):
            page = Page(words, spans, tags * (_LONG // 2), boxes, None)
            found.append(Example(" ".join(words), " ".join(page.tags), line, page))
        return found

    def load_model(self, path: str) -> Any:
        """The base with a head of one output a tag for each token."""
        model = super().load_model(path)
        self.learned["family"] = model.config.model_type
        return model

    def idle(self, model: Any) -> list[str]:
        """What computes nothing that a tag depends on, or is read under no_grad."""
        names, last = [name for name, _ in model.named_modules()], f".layer.{model.config.num_hidden_layers - 1}."
        idle = {
            "layoutlm": lambda name: ".pooler." in name,
            "layoutlmv3": lambda name: name.endswith(READ_AS_TABLES),
            "lilt": lambda name: last in name and "layout_" in name and name.endswith((".dense", ".layout_value")),
        }[model.config.model_type]
        return [name for name in names if idle(name)]

    def paths(self, model: Any) -> list[str]:
        """Nothing; raises ConfigError for virtual tokens in front of what LayoutLMv3 reads."""
        methods = [config for config in model.peft_config.values() if getattr(config, "num_virtual_tokens", None)]
        if methods and model.config.model_type == "layoutlmv3":
            raise ConfigError("method.name: LayoutLMv3, as transformers has it, takes no virtual tokens; take lora, for one")
        return super().paths(model)

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Windows of each page. `words` says which word a piece begins, -1 none that is answered in this window; `boxes` are
        those of the pieces, one after the other."""
        self._check_pictures(examples)
        reader = self.tokenizer.backend_tokenizer
        reader.no_truncation()
        reader.no_padding()
        whole = reader.encode_batch([e.text for e in examples])
        longest = max(len(encoded.ids) for encoded in whole)
        length = min(limit, longest) if max_length is None else max_length
        number = {label: i for i, label in enumerate(self.labels)}
        features, several, unread = list[Feature](), 0, list[Example]()
        for row, (example, encoded) in enumerate(zip(examples, whole, strict=True)):
            page: Page = example.value
            inside = words_of_pieces(example.text, page.spans, encoded.offsets)
            first, special = first_seen(inside), encoded.special_tokens_mask
            begin = special.index(0) if 0 in special else len(special)
            end = len(special) - special[::-1].index(0) if 0 in special else begin
            middle = [page.boxes[word] if word >= 0 else (0, 0, 0, 0) for word in _filled(inside[begin:end])]
            boxes = [*[(0, 0, 0, 0)] * begin, *middle, *[self._end_box()] * (len(special) - end)]
            if example.label and max(first, default=-1) < 0:
                unread.append(example)
            made = self._windows(end - begin, length - begin - (len(special) - end))
            several += len(made) > 1
            for start, stop, own, past in made:
                places = [*range(begin), *range(begin + start, begin + stop), *range(end, len(special))]
                words = [first[i] if own <= i - begin < past else -1 for i in places]
                feature: Feature = {
                    "input_ids": [encoded.ids[i] for i in places], "row": row, "words": words,
                    "boxes": [side for i in places for side in boxes[i]],
                }  # fmt: skip
                if self.reads_files:
                    feature["file"] = page.picture
                if example.label:
                    tags = [number.get(tag, IGNORED) for tag in page.tags]
                    feature["labels"] = [IGNORED if word < 0 else tags[word] for word in words]
                features.append(feature)
        if unread:
            lines = shortened((e.line for e in unread), _SHOWN)
            raise DataError(
                f"{len(unread)} pages (line {lines}) have no word that the tokenizer reads, for example "
                f"{unread[0].text[:60]!r}; remove them"
            )
        return Encoded(features, 0, length, [*self._notes(), *self._found(examples, several, len(features), length)])

    def _check_pictures(self, examples: Sequence[Example]) -> None:
        lacking = [e.line for e in examples if self.reads_files and e.value.picture == ""]
        if lacking:
            raise DataError(
                f"{len(lacking)} of {len(examples)} pages (line {shortened(lacking, _SHOWN)}) name no picture, and the "
                "model looks at pages: name them in a column image, or read words and boxes alone with task.pictures=false"
            )

    def _end_box(self) -> Box:
        """Of what comes after the words."""
        corner = GRID if self.learned.get("family") == "layoutlm" else 0
        return corner, corner, corner, corner

    def _windows(self, pieces: int, room: int) -> list[tuple[int, int, int, int]]:
        """First piece and one past the last of each window, and the same of those that are answered in it."""
        if pieces <= room:
            return [(0, pieces, 0, pieces)]
        shared = room // _SHARE if self.options.stride is None else self.options.stride
        if room <= shared or room < 1:
            said = "" if self.options.stride is None else f" and task.stride={shared} of them are to be shared"
            raise ConfigError(f"windows have room for {max(room, 0)} pieces (training.max_length){said}; make them longer")
        starts = list(range(0, pieces - shared, room - shared))
        middles = [(start + shared // 2) for start in starts[1:]]  # of what two windows share
        return [
            (start, min(start + room, pieces), own, past)
            for start, own, past in zip(starts, [0, *middles], [*middles, pieces], strict=True)
        ]

    def _found(self, examples: Sequence[Example], several: int, windows: int, length: int) -> list[str]:
        """What was found out about the pages."""
        said = []
        if several:
            one = "1 page is" if several == 1 else f"{several} pages are"
            said.append(f"{one} longer than {length} tokens: {windows} windows of {len(examples)} pages, no word is lost")
        if cut := sum(e.value.cut for e in examples):
            said.append(f"{cut} boxes reached over the edge of their page and were cut there (task.clip)")
        if (most := max((max(box[2:]) for e in examples for box in e.value.boxes), default=GRID)) < _NEAR:
            said.append(f"no box of any page reaches beyond {most} thousandths: are they {self.options.boxes}? (task.boxes)")
        if any(e.value.picture for e in examples) and not self.reads_files:
            why = f"{self.learned.get('family')} reads words and boxes" if self.options.pictures else "task.pictures=false"
            said.append(f"the pictures of the pages are not looked at ({why})")
        return said

    def ready(self, feature: Feature, chance: str | None = None) -> Feature:
        """With "pixel_values" `[channels, height, width]` float32, where the model looks at pages."""
        if "file" not in feature:
            return feature
        try:
            picture = self._blank() if feature["file"] is None else read_picture(feature["file"])
        except (ValueError, OSError) as error:
            raise DataError(f"{feature['file']}: {error}; it could be read when the run began") from None
        made = self.processor.pages(images=picture, return_tensors="np")["pixel_values"]
        return {**feature, "pixel_values": np.asarray(made[0], dtype=np.float32)}

    @staticmethod
    def _blank() -> Any:
        from PIL import Image

        return Image.new("RGB", _BLANK, "white")

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Ids, mask, `words` and labels `[rows, tokens]`, `bbox` `[rows, tokens, 4]`, and where the model looks at pages
        `pixel_values` `[rows, channels, height, width]`."""
        batch = super().collate(features)
        rows, width = batch["input_ids"].shape
        batch["bbox"] = padded([f["boxes"] for f in features], 0, 4 * width).view(rows, width, 4)
        if self.reads_files:
            made = [f if "pixel_values" in f else self.ready(f) for f in features]
            batch["pixel_values"] = torch.from_numpy(np.stack([f["pixel_values"] for f in made]))
        return batch

    # --- answers

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Scores `[rows, tokens, tags]`; those of virtual tokens in front are left out."""
        given = {key: batch[key] for key in ("input_ids", "bbox", "attention_mask", "pixel_values") if key in batch}
        return model(**given).logits.float()[:, -batch["input_ids"].shape[1] :]  # type: ignore[no-any-return]

    def join(self, answers: Sequence[Any], rows: Rows) -> list[Any]:
        """Tags of all words of each page, those of its windows together."""
        read: list[list[int]] = [[] for _ in rows.examples]
        sure: list[list[np.ndarray]] = [[] for _ in rows.examples]
        for feature, (words, probabilities) in zip(rows.features, answers, strict=True):
            read[feature["row"]] += words
            sure[feature["row"]].append(probabilities)
        return [
            self._tagged(example, words, np.concatenate(each))
            for example, words, each in zip(rows.examples, read, sure, strict=True)
        ]

    def respond(self, answer: Tagged, example: Example) -> dict[str, Any]:
        """As for texts; entities with their box too, in thousandths of the page."""
        made = super().respond(answer, example)
        for entity, (_, first, last) in zip(made["entities"], self.scheme.entities(answer.tags), strict=True):
            x0, y0, x1, y1 = zip(*example.value.boxes[first:last], strict=True)
            entity["box"] = [min(x0), min(y0), max(x1), max(y1)]
        return made


def _filled(words: Sequence[int]) -> list[int]:
    """Numbers of words, a piece of none (a lone space) taking the next word's, at the end the last one's."""
    found, near = list(words), -1
    for order in (range(len(found) - 1, -1, -1), range(len(found))):
        for i in order:
            near = found[i] = found[i] if found[i] >= 0 else near
    return found
