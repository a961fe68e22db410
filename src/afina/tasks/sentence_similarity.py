"""How alike two texts are, by the angle between their vectors: search, duplicates, clustering.

Each text is read by itself, so that vectors can be computed once and kept. What is trained on follows from the file:

  - pairs with a score in the label column: the cosine of two vectors is brought to the score (squared error);
  - pairs without a label, which all belong together: each first text is to find its second among all of the step's
    (see `in_batch.py`); the larger the batch, the harder and the better.

A text by itself is answered with its vector.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from afina.core.config import option
from afina.data.clean import normalised
from afina.data.example import Column, Example, Kind
from afina.errors import ConfigError, DataError, shortened
from afina.tasks.baselines import word_overlap
from afina.tasks.batches import pad_right
from afina.tasks.in_batch import ranking_losses, ranks, step_loss
from afina.tasks.loading import load_base
from afina.tasks.orders import pearson, spearman
from afina.tasks.pooling import POOLINGS, find_pooling, pooled
from afina.tasks.regression import number_in
from afina.tasks.task import Batch, Encoded, Feature, Figure, Rows, Task

__all__ = ["SentenceSimilarity", "SimilarityOptions"]

POOL = 1000  # pairs among which a second text is looked for, when ranks are measured
RECALLS = (1, 5, 10)
FIRST = ("text", "text_a", "text1", "sentence1", "sentence_a", "anchor", "query", "question")
SECOND = ("text_pair", "text_b", "text2", "sentence2", "sentence_b", "positive", "passage", "answer")


@dataclasses.dataclass
class SimilarityOptions:
    """How vectors are made and compared."""

    pooling: str = option("auto", "tokens to vector; auto: as the model's folder says", choices=("auto", *POOLINGS))
    objective: str = option(
        "auto", "what is learned; auto: scores where there are any, else pairs", choices=("auto", "scores", "pairs")
    )
    temperature: float = option(0.05, "of the softmax over candidates, for pairs; lower is stricter", low=0.001, high=10.0)


def make(row: Mapping[str, str], line: int | str) -> Example:
    """Two texts and, where there is one, their score. One text alone may be asked; in a file both are needed."""
    first, second, label = row["text"], row.get("text_pair"), row.get("label", "")
    if label:
        try:
            number_in(label)
        except ValueError as error:
            raise ValueError(f"{error}; for classes of pairs there is the task sequence_classification") from None
    if second == "":
        return Example("", label, line)
    text = first if second is None else f"{first}\n{second}"
    return Example(text if first else "", label, line, (first, second), group=normalised(first))


class SentenceSimilarity(Task):
    """How alike two texts are, by a vector of each."""

    name = "sentence_similarity"
    task_type = "FEATURE_EXTRACTION"
    kind = Kind(
        columns={
            "text": Column("the first text", FIRST),
            "text_pair": Column("the second text", SECOND, required=False),
            "label": Column("how alike they are", ("score", "similarity", "label"), required=False),
        },
        labels="none",
        make=make,
    )
    of_scores = {"spearman": Figure("Spearman"), "pearson": Figure("Pearson"), "loss": Figure("loss", better=-1)}
    of_pairs = {
        "mrr": Figure("MRR"),
        **{f"recall_at_{k}": Figure(f"recall@{k}", ".1%") for k in RECALLS},
        "loss": Figure("loss", better=-1),
    }
    figures = {**of_pairs, **of_scores}
    smooths = False
    untuned = True
    Options = SimilarityOptions
    options: SimilarityOptions

    def __init__(self, tokenizer: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(tokenizer, options, learned)
        if self.options.objective == "scores" and not self.learned.get("scored"):
            raise DataError("task.objective=scores: there is no column of scores; name it with data.label")
        self.scored = bool(self.learned.get("scored")) and self.options.objective != "pairs"
        if self.scored and self.options.temperature != SimilarityOptions().temperature:
            raise ConfigError(
                f"task.temperature={self.options.temperature:g} belongs to pairs without scores; these have scores, so "
                "leave it out, or say task.objective=pairs"
            )
        self.figures = dict(self.of_scores if self.scored else self.of_pairs)  # type: ignore[misc]
        self.pooling = self.options.pooling

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """Whether there are scores, and the smallest and largest of the training rows."""
        everything = [*train, *others]
        if alone := [e.line for e in everything if not e.value or not e.value[1]]:
            raise DataError(
                f"there is no second text (line {shortened(alone, 5)}); name its column with data.text_pair"
            )
        without = [e.line for e in everything if not e.label]
        if len(without) == len(everything):
            return {"scored": False}
        if without:
            raise DataError(
                f"{len(without)} of {len(everything)} rows have no score (line {shortened(without, 5)}); give all rows one, "
                "or leave the column out to train on pairs that belong together"
            )
        values = [number_in(e.label) for e in train]
        low, high = min(values), max(values)
        if low == high:
            raise DataError(
                f"the score is {low:g} in every training row; leave the column out to train on pairs that belong together"
            )
        return {"scored": True, "low": low, "high": high}

    # --- scores and cosines

    def _range(self) -> tuple[float, float]:
        """The scores that cosines of 0 and 1 stand for: those that are cosines already stay as they are."""
        low, high = self.learned["low"], self.learned["high"]
        return (0.0, 1.0) if low >= -1 and high <= 1 else (low, high)

    def _cosine(self, label: str) -> float:
        low, high = self._range()
        return (number_in(label) - low) / (high - low)

    # --- model

    def load_model(self, path: str) -> Any:
        """The base without a head; of an encoder with a decoder, the encoder."""
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

        config = AutoConfig.from_pretrained(path)
        if self.options.pooling == "auto":
            self.pooling = find_pooling(path, config)
        auto = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        return load_base(self, auto, path, heads=())

    def idle(self, model: Any) -> list[str]:
        """What BERT and its like compute of the first token for the next sentence."""
        inside = getattr(model, "pooler", None)
        if not isinstance(inside, torch.nn.Module):
            return []
        weighty = [name for name, m in inside.named_modules() if list(m.parameters(recurse=False))]
        return [f"pooler.{name}".rstrip(".") for name in weighty]

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Token ids of the first texts and, apart, of the second ones, each cut off at `max_length`."""
        texts = [text for e in examples for text in (e.value or (e.text, None)) if text is not None]
        made = self.tokenizer(texts, truncation=False, padding=False)["input_ids"]
        length = min(limit, max(len(row) for row in made)) if max_length is None else max_length
        long = {i for i, row in enumerate(made) if len(row) > length}
        if long:
            made = self.tokenizer(texts, truncation=True, max_length=length, padding=False)["input_ids"]
        if empty := [text for text, row in zip(texts, made, strict=True) if not row]:
            raise DataError(f"{len(empty)} texts have no token at all, for example {empty[0]!r}")
        features: list[Feature] = []
        numbers = _numbers(examples)
        place = cut = 0
        for i, example in enumerate(examples):
            second = example.value[1] if example.value else None
            feature: Feature = {"input_ids": list(made[place]), "row": i, "texts": numbers[i]}
            if second is not None:
                feature["pair_ids"] = list(made[place + 1])
            if self.scored and example.label:
                feature["label"] = self._cosine(example.label)
            cut += place in long or (second is not None and place + 1 in long)
            place += 1 + (second is not None)
            features.append(feature)
        return Encoded(features, cut, length)

    def collate(self, features: Sequence[Feature]) -> Batch:
        """All first texts and then all second ones, `[texts, tokens]`; `second [rows]` says where, -1 for none."""
        pairs = [i for i, f in enumerate(features) if "pair_ids" in f]
        stacked = [*features, *({"input_ids": features[i]["pair_ids"]} for i in pairs)]
        batch = pad_right([{"input_ids": f["input_ids"]} for f in stacked], self.tokenizer.pad_token_id)
        second = torch.full((len(features),), -1)
        second[pairs] = torch.arange(len(features), len(stacked))
        batch |= {"second": second, "texts": torch.tensor([f["texts"] for f in features])}
        if "label" in features[0]:
            batch["labels"] = torch.tensor([f["label"] for f in features])
        return batch

    # --- vectors

    def vectors(self, model: Any, batch: Batch) -> torch.Tensor:
        """Of all texts of a batch, `[texts, width]`, float32, of length 1."""
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return pooled(hidden, batch["attention_mask"], self.pooling)

    def _pairs(self, model: Any, batch: Batch) -> torch.Tensor:
        """`[2, rows, width]`, where all rows are pairs."""
        made = self.vectors(model, batch)
        return torch.stack([made[: len(batch["second"])], made[batch["second"]]])

    # --- loss

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its pairs."""
        return float(len(batch["second"]))

    @property
    def parts_share(self) -> bool:
        """Pairs without scores are learned from each other."""
        return not self.scored

    def share(self, model: Any, parts: Sequence[Batch], gather: Callable[[Any], list[Any]], process: int) -> None:
        """Every part gets the vectors of the whole step, as constants."""
        with torch.no_grad():
            own = [(self._pairs(model, part).cpu(), part["texts"].cpu()) for part in parts]
        everyone = gather(own)
        vectors = torch.cat([v for made in everyone for v, _ in made], dim=1)
        texts = torch.cat([t for made in everyone for _, t in made])
        place = sum(len(t) for made in everyone[:process] for _, t in made)
        for part, (_, numbers) in zip(parts, own, strict=True):
            device = part["second"].device
            part |= {"step": vectors.to(device), "step_texts": texts.to(device), "place": torch.tensor(place)}
            place += len(numbers)

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Squared errors of the cosines, or the loss of finding the second text among the step's, summed over pairs."""
        own = self._pairs(model, batch)
        if self.scored:
            return (((own[0] * own[1]).sum(dim=-1) - batch["labels"].float()) ** 2).sum()
        temperature = self.options.temperature
        if "step" in batch:
            return step_loss(own, batch["step"], int(batch["place"]), batch["step_texts"], temperature)
        return ranking_losses(own[0], own[1], batch["texts"], temperature).sum()

    # --- answers

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """The vectors of each row, `[1 or 2, width]`, float32."""
        made, second = self.vectors(model, batch).cpu().numpy(), batch["second"].tolist()
        return [made[[i, j]] if j >= 0 else made[[i]] for i, j in enumerate(second)]

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """The vectors."""
        return self.vectors(model, batch)

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """Correlations of cosine and score; or, of pairs, where each second text ranks among up to 1,000 of them."""
        if self.scored:
            if without := [e.line for e in examples if not e.label]:
                raise DataError(f"{len(without)} of {len(examples)} rows have no score (line {shortened(without, 5)})")
            cosines = np.asarray([float(a @ b) for a, b in answers])
            targets = np.asarray([self._cosine(e.label) for e in examples])
            return {
                "rows": len(examples),
                "spearman": spearman(cosines, targets) or 0.0,
                "pearson": pearson(cosines, targets) or 0.0,
                "loss": float(((cosines - targets) ** 2).mean()),
            }
        return self._ranked(lambda pool: np.stack([np.stack(a) for a in answers[pool]]), examples)

    def _ranked(self, vectors: Callable[[slice], np.ndarray], examples: Sequence[Example]) -> dict[str, Any]:
        """Figures of pairs by their vectors `[pairs, 2, width]`, which are asked for a pool of pairs at a time."""
        pools = -(-len(examples) // POOL)
        losses, places = list[float](), list[float]()
        for start in range(pools):
            pool = slice(start, None, pools)
            first, second = torch.from_numpy(vectors(pool)).unbind(dim=1)
            texts = torch.tensor(_numbers(examples[pool]))
            losses += ranking_losses(first, second, texts, self.options.temperature).tolist()
            places += ranks(first, second, texts).tolist()
        found = np.asarray(places)
        return {
            "rows": len(examples),
            "candidates": -(-len(examples) // pools),
            "mrr": float((1 / found).mean()),
            **{f"recall_at_{k}": float((found <= k).mean()) for k in RECALLS},
            "loss": float(np.mean(losses)),
        }

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Shared words, rare ones weighing more."""
        known = [text for e in train.examples for text in e.value]

        def vectors(pool: slice) -> np.ndarray:
            texts = [text for e in test.examples[pool] for text in e.value]
            return word_overlap(known, texts).reshape(len(texts) // 2, 2, -1)

        if not self.scored:
            made = self._ranked(vectors, test.examples)
        else:
            blocks = [vectors(slice(i, i + POOL)) for i in range(0, len(test.examples), POOL)]
            made = self.metrics([pair for block in blocks for pair in block], test.examples)
        return {"word_overlap": {"title": "shared words (TF-IDF)", **made}}

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The score or the cosine of a pair; of a text by itself, its vector as JSON."""
        made = {
            key: json.dumps(value, separators=(",", ":")) if isinstance(value, list) else f"{value:.6f}"
            for key, value in self.respond(answer, example).items()
        }
        return {"answer": made.pop(next(iter(made))), **made}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """As `columns`: `score` in the unit of the file and `similarity`, the cosine; or `vector`."""
        if len(answer) == 1:
            return {"vector": [round(float(x), 6) for x in answer[0]]}
        cosine = float(answer[0] @ answer[1])
        if not self.scored:
            return {"similarity": cosine}
        low, high = self._range()
        return {"score": low + cosine * (high - low), "similarity": cosine}

    def arrays(self, answers: Sequence[Any | None]) -> dict[str, Any]:
        """`text [rows, width]` and, where there are second texts, `text_pair [rows, width]`, float32, of length 1."""
        width = next(a for a in answers if a is not None).shape[1]
        made = np.full((2, len(answers), width), np.nan, dtype=np.float32)
        for i, answer in enumerate(answers):
            if answer is not None:
                made[: len(answer), i] = answer
        return {"text": made[0]} | ({} if np.isnan(made[1]).all() else {"text_pair": made[1]})

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """The tokens of both texts."""
        ids = [*feature["input_ids"], *feature.get("pair_ids", [])]
        return self.tokenizer.convert_ids_to_tokens(ids), [False] * len(ids)


def _numbers(examples: Sequence[Example]) -> list[list[int]]:
    """A number for each text of each example, the same for the same text wherever it stands; -1 where there is none."""
    seen: dict[str, int] = {}
    return [
        [-1 if text is None else seen.setdefault(normalised(text), len(seen)) for text in e.value or (e.text, None)]
        for e in examples
    ]
