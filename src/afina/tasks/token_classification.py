"""A tag a word: names of people and places, parts of speech.

The first piece of a word carries its tag, the others count nowhere. A word that the model did not read, since its text was
cut off or the tokenizer has nothing for it, is answered with O (or the commonest tag), so that it counts as missed. Answers
are the likeliest sequence of tags that is legal in the scheme of the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from afina.data.conll import read_conll
from afina.data.example import Column, Example, Kind
from afina.errors import DataError, shortened
from afina.tasks.batches import pad_right, padded
from afina.tasks.entities import Scheme, find_scheme, legal_path, scores
from afina.tasks.loading import load_base
from afina.tasks.task import IGNORED, Batch, Encoded, Feature, Figure, Rows, Task
from afina.tasks.words import Span, first_pieces, joined, need_offsets, split_words

__all__ = ["Tagged", "TokenClassification", "Words"]

_SHOWN = 5  # names in an error


@dataclass(frozen=True)
class Words:
    """The words of a text, where they are in it, and their tags, if known."""

    words: tuple[str, ...]
    spans: tuple[Span, ...]
    tags: tuple[str, ...] = ()


@dataclass
class Tagged:
    """An answer: the tag of every word, and the probabilities `[words, tags]` of those that were read."""

    tags: list[str]
    read: list[int]  # numbers of the words
    probabilities: np.ndarray


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A list of words and a list of as many tags, both as JSON or separated by white space; without tags, any text."""
    text, label = row["text"], row.get("label", "").strip()
    words, tags = _listed(text.strip()), _listed(label)
    if words is None and label and text.strip().startswith("[") and text.strip().endswith("]"):
        raise ValueError(f'{text[:40]!r} is no JSON list of words; expected ["a", "list", "of", "words"], in double quotes')
    if words is None and not label:
        plain = split_words(text)
        return Example(text, "", line, Words(tuple(text[a:b] for a, b in plain), tuple(plain)))
    words, tags = text.split() if words is None else words, label.split() if tags is None else tags
    if label and len(words) != len(tags):
        raise ValueError(f"{len(words)} words and {len(tags)} tags; expected a tag for each word")
    for what, values in (("word", words), ("tag", tags)):
        if not all(value.strip() for value in values):
            raise ValueError(f"{what} {[bool(value.strip()) for value in values].index(False) + 1} is empty")
    if broken := [tag for tag in tags if len(tag.split()) > 1]:
        raise ValueError(f"the tag {broken[0]!r} holds white space")
    whole, spans = joined(words)
    return Example(whole, " ".join(tags), line, Words(tuple(words), tuple(spans), tuple(tags)))


def _listed(text: str) -> list[str] | None:
    """A JSON list of texts or whole numbers; None where it is no JSON list."""
    try:
        values = json.loads(text) if text.startswith("[") else None
    except (json.JSONDecodeError, RecursionError):
        return None
    if values is None:
        return None
    wrong = [value for value in values if not isinstance(value, str | int) or isinstance(value, bool)]
    if wrong:
        raise ValueError(f"{json.dumps(wrong[0])[:40]} is in a list of words or tags; expected texts")
    return [str(value) for value in values]


class TokenClassification(Task):
    """What the loop must know of the task."""

    name = "token_classification"
    widens = True
    task_type = "TOKEN_CLS"
    kind = Kind(
        columns={
            "text": Column("the words", ("tokens", "words", "text", "sentence"), structured=True, repair=False),
            "label": Column("the tag of each word", ("tags", "ner_tags", "labels", "label"), structured=True, repair=False),
        },
        labels="text",
        make=make,
        read=read_conll,
    )
    figures = {
        "f1": Figure("entity F1"),
        "precision": Figure("precision"),
        "recall": Figure("recall"),
        "accuracy": Figure("words tagged right", ".1%"),
        "loss": Figure("loss", better=-1),
    }

    def __init__(self, tokenizer: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(tokenizer, options, learned)
        need_offsets(self.tokenizer)
        self.scheme = Scheme(self.learned.get("scheme", "plain"))

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """The tags, the commonest first; their scheme, and how many texts break it. Raises DataError for tags that differ in
        case alone (T29)."""
        texts = [e.value.tags for e in (*train, *others)]
        counts = Counter(tag for tags in texts for tag in tags)
        spellings: dict[str, list[str]] = {}
        for tag in counts:
            spellings.setdefault(tag.casefold(), []).append(tag)
        twice = [tags for tags in spellings.values() if len(tags) > 1]
        if twice:
            said = shortened((" and ".join(f"{tag!r} ({counts[tag]} words)" for tag in tags) for tags in twice), _SHOWN)
            raise DataError(f"tags that differ in case alone would be classes of their own: {said}. Write them alike")
        if len(counts) < 2:
            raise DataError(f"every word has the tag {next(iter(counts), '')!r}; there is nothing to tell apart")
        scheme, illegal = find_scheme(texts)
        labels = sorted(counts, key=lambda tag: (-counts[tag], tag))
        return {"labels": labels, "scheme": scheme.name, "illegal": illegal}

    def _notes(self) -> list[str]:
        """What was found out about the tags."""
        how = {"IO": "plain tags and O: neighbouring words of one tag are one entity", "plain": "plain tags, one a word"}
        said = [f"tags: {how.get(self.scheme.name, self.scheme.name)}"]
        if all(label.isdigit() for label in self.labels):
            said.append("tags are numbers, so none is known to mean no entity: every word counts in F1. Write names instead")
        if illegal := self.learned.get("illegal", 0):
            said.append(
                f"{illegal} text{'s have' if illegal > 1 else ' has'} tags that break {self.scheme.name}, read as conlleval "
                "does: an entity begins where a tag cannot go on from the one before"
            )
        return said

    # --- model

    def load_model(self, path: str) -> Any:
        """The base with a head of one output a tag for each token."""
        from transformers import AutoModelForTokenClassification

        names = dict(enumerate(self.labels))
        return load_base(
            self, AutoModelForTokenClassification, path, num_labels=len(names), id2label=names,
            label2id={label: i for i, label in names.items()},
        )  # fmt: skip

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Pieces of each text, its end cut off at `max_length`; `words` says which word a piece begins, -1 none."""
        texts = [joined(e.value.words) for e in examples]
        settings = {"padding": False, "return_offsets_mapping": True, "return_token_type_ids": False}
        plain = [text for text, _ in texts]
        whole = self.tokenizer(plain, truncation=False, **settings)
        longest = max(len(row) for row in whole["input_ids"])
        length = min(limit, longest) if max_length is None else max_length
        cut = sum(len(row) > length for row in whole["input_ids"])
        if cut:
            whole = self.tokenizer(plain, truncation=True, max_length=length, **settings)
        number = {label: i for i, label in enumerate(self.labels)}
        features: list[Feature] = []
        for i, (example, (text, spans)) in enumerate(zip(examples, texts, strict=True)):
            words = first_pieces(text, spans, whole["offset_mapping"][i])
            feature: Feature = {"input_ids": list(whole["input_ids"][i]), "row": i, "words": words}
            if example.label:
                tags = [number.get(tag, IGNORED) for tag in example.value.tags]
                feature["labels"] = [IGNORED if word < 0 else tags[word] for word in words]
            features.append(feature)
        unread = [e for e, f in zip(examples, features, strict=True) if e.label and max(f["words"], default=-1) < 0]
        if unread:
            lines = shortened((e.line for e in unread), _SHOWN)
            raise DataError(
                f"{len(unread)} texts (line {lines}) have no word that the tokenizer reads, for example "
                f"{unread[0].text[:60]!r}; remove them"
            )
        return Encoded(features, cut, length, self._notes())

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Ids and mask, and `words`: number of the word that a token begins, else -1; labels where there are. All
        `[rows, tokens]`."""
        width = self.width(features)
        batch = pad_right(features, self.tokenizer.pad_token_id, width)
        batch["words"] = padded([f["words"] for f in features], -1, width)
        if "labels" in features[0]:
            batch["labels"] = padded([f["labels"] for f in features], IGNORED, width)
        return batch

    # --- loss

    def _weights(self, device: torch.device) -> torch.Tensor | None:
        return None if self.class_weights is None else torch.tensor(self.class_weights, device=device)

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Words that carry a tag, or the sum of their tags' weights."""
        labels = batch["labels"][batch["labels"] != IGNORED]
        weights = self._weights(labels.device)
        return float(labels.numel() if weights is None else weights[labels].sum())

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the tags, summed."""
        logits = self.logits(model, batch).flatten(0, 1)
        return F.cross_entropy(
            logits, batch["labels"].flatten(), self._weights(logits.device), ignore_index=IGNORED, reduction="sum",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Scores `[rows, tokens, tags]`; those of virtual tokens in front are left out."""
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        return found[:, -batch["input_ids"].shape[1] :]  # type: ignore[no-any-return]

    # --- answers

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """Of each row the numbers of the words that were read, and their probabilities `[words, tags]`."""
        made = torch.softmax(self.logits(model, batch).double(), dim=-1).float().detach().cpu().numpy()
        words = batch["words"].cpu().numpy()
        return [(row[row >= 0].tolist(), p[row >= 0]) for row, p in zip(words, made, strict=True)]

    def join(self, answers: Sequence[Any], rows: Rows) -> list[Any]:
        """Tags of all words of each example."""
        return [
            self._tagged(rows.examples[feature["row"]], read, probabilities)
            for feature, (read, probabilities) in zip(rows.features, answers, strict=True)
        ]

    def _tagged(self, example: Example, read: list[int], probabilities: np.ndarray) -> Tagged:
        tags = [self._default()] * len(example.value.words)
        for word, i in zip(read, legal_path(probabilities, self.labels, self.scheme), strict=True):
            tags[word] = self.labels[i]
        return Tagged(tags, read, probabilities)

    def _default(self) -> str:
        return "O" if "O" in self.labels else self.labels[0]

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """See `scores`. `missed_words` were not read and count as answered with O; the loss is that of the words read."""
        number = {label: i for i, label in enumerate(self.labels)}
        loss = np.array([
            -np.log(max(float(p[number[e.value.tags[word]]]), 1e-12))
            for a, e in zip(answers, examples, strict=True)
            for word, p in zip(a.read, a.probabilities, strict=True)
            if e.value.tags[word] in number
        ])  # fmt: skip
        words = sum(len(e.value.words) for e in examples)
        return {
            "rows": len(examples),
            "words": words,
            "missed_words": words - sum(len(a.read) for a in answers),
            "loss": float(loss.mean()) if len(loss) else 0.0,
            "scheme": self.scheme.name,
            **scores([e.value.tags for e in examples], [a.tags for a in answers], self.scheme),
        }

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """The commonest tag of each word in the training rows, and of all words."""
        number = {label: i for i, label in enumerate(self.labels)}
        prior = np.zeros(len(number))
        counts: dict[str, np.ndarray] = {}
        for example in train.examples:
            for word, tag in zip(example.value.words, example.value.tags, strict=True):
                prior[number[tag]] += 1
                counts.setdefault(word, np.zeros(len(number)))[number[tag]] += 1
        prior /= prior.sum()
        known = {word: (c + prior) / (c.sum() + 1) for word, c in counts.items()}
        figures = {}
        for name, title, table in (
            ("seen_words", "each word as most often in training", known),
            ("majority", "always the commonest tag", {}),
        ):
            found = [[table.get(word, prior) for word in e.value.words] for e in test.examples]
            answers = [
                Tagged([self.labels[int(p.argmax())] for p in row], list(range(len(row))), np.stack(row)) for row in found
            ]
            figures[name] = {"title": title, **self.metrics(answers, test.examples)}
        return figures

    def right(self, answer: Any, example: Example) -> bool:
        """Whether every word has its tag."""
        return list(answer.tags) == list(example.value.tags)

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The entities with type and probability, and the tags."""
        found = self._entities(answer, example)
        said = "; ".join(f"{e['text']} ({e['type']}, {e['probability']:.3f})" for e in found)
        return {"answer": said or "(none)", "answer_tags": " ".join(answer.tags)}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """Entities with their characters in the text and the least probability of their words' tags; words and tags."""
        return {"entities": self._entities(answer, example), "words": list(example.value.words), "tags": list(answer.tags)}

    def _entities(self, answer: Any, example: Example) -> list[dict[str, Any]]:
        number = {label: i for i, label in enumerate(self.labels)}
        sure = {w: float(p[number[answer.tags[w]]]) for w, p in zip(answer.read, answer.probabilities, strict=True)}
        found, spans = [], example.value.spans
        for kind, first, last in self.scheme.entities(answer.tags):
            start, end = spans[first][0], spans[last - 1][1]
            found.append({
                "text": example.text[start:end], "type": kind, "start": start, "end": end,
                "probability": min(sure.get(word, 0.0) for word in range(first, last)),
            })  # fmt: skip
        return found
