"""How alike two texts are, by the angle between their vectors: search, duplicates, clustering.

Each text is read by itself, so that vectors can be computed once and kept. What is trained on follows from the file:

  - pairs with a score in the label column: the cosine of two vectors is brought to the score (squared error);
  - pairs without a label, which all belong together, a query and its passage: each query is to find its passage among
    all of the step's (see `in_batch.py`), and among passages that a row names as wrong; the larger the batch, the harder
    and the better. How well it does is measured by search among all passages of a side (see `retrieval.py`).

A text by itself is answered with its vector.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from afina.core.config import option
from afina.data.clean import normalised
from afina.data.example import Column, Example, Kind
from afina.errors import ConfigError, DataError, shortened
from afina.tasks.baselines import word_overlap
from afina.tasks.batches import pad_right, padded
from afina.tasks.in_batch import Texts, ranking_losses, step_gradients
from afina.tasks.loading import load_base
from afina.tasks.orders import pearson, spearman
from afina.tasks.passages import NEGATIVES, NO_TEXT, PASSAGES, QUERIES, Numbered, numbered, passages_in
from afina.tasks.pooling import POOLINGS, find_pooling, pooled
from afina.tasks.regression import number_in
from afina.tasks.replay import chance_of, draw_again
from afina.tasks.retrieval import RECALLS, Ranking, figures_of, ranking
from afina.tasks.task import Batch, Encoded, Feature, Figure, Rows, Task
from afina.tasks.word_search import WordSearch

__all__ = ["SentenceSimilarity", "SimilarityOptions"]

POOL = 1000  # pairs whose loss is measured together, and queries that are looked up at once


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
    wrong = passages_in(row.get("negatives", ""))
    if second == "":
        return Example("", label, line)
    text = first if second is None else f"{first}\n{second}"
    return Example(text if first else "", label, line, (first, second, *wrong), group=normalised(first))


class SentenceSimilarity(Task):
    """How alike two texts are, by a vector of each."""

    name = "sentence_similarity"
    task_type = "FEATURE_EXTRACTION"
    kind = Kind(
        columns={
            "text": Column("the first text, or the query", QUERIES),
            "text_pair": Column("the second text, or the passage that answers it", PASSAGES, required=False),
            "negatives": NEGATIVES,
            "label": Column("how alike they are", ("score", "similarity", "label"), required=False),
        },
        labels="none",
        make=make,
    )
    of_scores = {"spearman": Figure("Spearman"), "pearson": Figure("Pearson"), "loss": Figure("loss", better=-1)}
    of_pairs = {
        "ndcg_at_10": Figure("nDCG@10"),
        "mrr_at_10": Figure("MRR@10"),
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
        if self.scored and self.learned.get("with_negatives"):
            raise DataError(
                "rows have a score and passages that do not answer (data.negatives): pairs with scores learn from the score "
                "alone. Leave one of the two columns out, or say task.objective=pairs"
            )
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
            raise DataError(f"there is no second text (line {shortened(alone, 5)}); name its column with data.text_pair")
        without = [e.line for e in everything if not e.label]
        wrong = sum(len(e.value) > 2 for e in train)
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
        return {"scored": True, "low": low, "high": high, **({"with_negatives": wrong} if wrong else {})}

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
        """Token ids of the first texts and, apart, of all others one after the other, each cut off at `max_length`."""
        values = [e.value or (e.text, None) for e in examples]
        texts = [text for value in values for text in value if text is not None]
        made = self.tokenizer(texts, truncation=False, padding=False)["input_ids"]
        length = min(limit, max(len(row) for row in made)) if max_length is None else max_length
        long = {i for i, row in enumerate(made) if len(row) > length}
        if long:
            made = self.tokenizer(texts, truncation=True, max_length=length, padding=False)["input_ids"]
        if empty := [text for text, row in zip(texts, made, strict=True) if not row]:
            raise DataError(f"{len(empty)} texts have no token at all, for example {empty[0]!r}")
        features: list[Feature] = []
        known = numbered(examples)
        place = cut = 0
        for i, example in enumerate(examples):
            count = sum(text is not None for text in values[i])
            own, others = made[place], made[place + 1 : place + count]
            feature: Feature = {"input_ids": list(own), "row": i, "texts": known.rows[i], "right": known.right[i]}
            if others:
                feature["pair_ids"] = [token for ids in others for token in ids]
                feature["ends"] = np.cumsum([len(ids) for ids in others]).tolist()
            if self.scored and example.label:
                feature["label"] = self._cosine(example.label)
            cut += any(n in long for n in range(place, place + count))
            place += count
            features.append(feature)
        return Encoded(features, cut, length, [] if self.scored else known.notes(examples))

    def collate(self, features: Sequence[Feature]) -> Batch:
        """All first texts, then all second ones, then all wrong passages, `[texts, tokens]`; `second [rows]` says where, -1
        for none, and `owner [wrong passages]` of which row."""
        others = [_split(f) for f in features]
        pairs = [i for i, own in enumerate(others) if own]
        wrong = [(i, n, ids) for i, own in enumerate(others) for n, ids in enumerate(own) if n]
        stacked = [*(f["input_ids"] for f in features), *(others[i][0] for i in pairs), *(ids for _, _, ids in wrong)]
        batch = pad_right([{"input_ids": ids} for ids in stacked], self.tokenizer.pad_token_id)
        second = torch.full((len(features),), -1)
        second[pairs] = torch.arange(len(features), len(features) + len(pairs))
        batch |= {
            "second": second,
            "owner": torch.tensor([i for i, _, _ in wrong], dtype=torch.long),
            "queries": torch.tensor([f["texts"][0] for f in features]),
            "passages": torch.tensor([f["texts"][1] for f in features]),
            "right": padded([f["right"] or [NO_TEXT] for f in features], NO_TEXT),
            "negatives": torch.tensor([features[i]["texts"][n + 1] for i, n, _ in wrong], dtype=torch.long),
        }
        if "label" in features[0]:
            batch["labels"] = torch.tensor([f["label"] for f in features])
        return batch

    # --- vectors

    def vectors(self, model: Any, batch: Batch) -> torch.Tensor:
        """Of all texts of a batch, `[texts, width]`, float32, of length 1."""
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return pooled(hidden, batch["attention_mask"], self.pooling)

    def _apart(self, model: Any, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Vectors of first texts and of second ones `[rows, width]`, and of wrong passages, where all rows are pairs."""
        made, rows = self.vectors(model, batch), len(batch["second"])
        return made[:rows], made[batch["second"]], made[2 * rows :]

    # --- loss

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its pairs."""
        return float(len(batch["second"]))

    @property
    def parts_share(self) -> bool:
        """Pairs without scores are learned from each other."""
        return not self.scored

    def share(self, model: Any, parts: Sequence[Batch], gather: Callable[[Any], list[Any]], process: int) -> None:
        """Every part gets its losses, and the gradients of the step at its vectors; see `in_batch.py`."""
        own = []
        for part in parts:
            part |= chance_of(part["second"].device)
            with torch.no_grad():
                own.append(([v.cpu() for v in self._apart(model, part)], _texts(part).to(torch.device("cpu"))))
        everyone = gather(own)
        if not parts:
            return  # the other processes have all rows of this step
        made = [entry for entries in everyone for entry in entries]
        device = parts[0]["second"].device
        vectors = [torch.cat([entry[0][kind] for entry in made]).to(device) for kind in range(3)]
        texts = Texts.joined([entry[1] for entry in made]).to(device)
        losses, gradients = step_gradients(vectors[0], vectors[1], vectors[2], texts, self.options.temperature)
        before = [entry for entries in everyone[:process] for entry in entries]
        row, wrong = sum(len(e[1].queries) for e in before), sum(len(e[1].negatives) for e in before)
        for part in parts:
            rows, count = len(part["second"]), len(part["owner"])
            part["losses"] = losses[row : row + rows]
            part["gradients"] = torch.cat([g[row : row + rows] for g in gradients[:2]])
            part["gradients_wrong"] = gradients[2][wrong : wrong + count]
            row, wrong = row + rows, wrong + count

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Squared errors of the cosines, or the loss of finding the passage among the step's, summed over pairs."""
        draw_again(batch, batch["second"].device)
        first, second, wrong = self._apart(model, batch)
        if self.scored:
            return (((first * second).sum(dim=-1) - batch["labels"].float()) ** 2).sum()
        if "losses" in batch:
            sent = (torch.cat([first, second]) * batch["gradients"]).sum() + (wrong * batch["gradients_wrong"]).sum()
            return batch["losses"].sum() + (sent - sent.detach())
        return ranking_losses(first, second, wrong, _texts(batch), self.options.temperature).sum()

    # --- answers

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """The vectors of each row, `[texts, width]`, float32: its query, its passage where it has one, wrong ones."""
        made, second = self.vectors(model, batch).cpu().numpy(), batch["second"].tolist()
        places = [[i, j] if j >= 0 else [i] for i, j in enumerate(second)]
        first = len(made) - len(batch["owner"])
        for n, row in enumerate(batch["owner"].tolist()):
            places[row].append(first + n)
        return [made[own] for own in places]

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """The vectors."""
        return self.vectors(model, batch)

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """Correlations of cosine and score; or, of pairs, how well queries find their passages among all of these."""
        if self.scored:
            if without := [e.line for e in examples if not e.label]:
                raise DataError(f"{len(without)} of {len(examples)} rows have no score (line {shortened(without, 5)})")
            cosines = np.asarray([float(a[0] @ a[1]) for a in answers])
            targets = np.asarray([self._cosine(e.label) for e in examples])
            return {
                "rows": len(examples),
                "spearman": spearman(cosines, targets) or 0.0,
                "pearson": pearson(cosines, targets) or 0.0,
                "loss": float(((cosines - targets) ** 2).mean()),
            }
        known = numbered(examples)
        found = dict(self._searched(answers, known))
        passages = {text for row in known.rows for text in row[1:]}
        return {
            "rows": len(examples),
            "candidates": len(passages),
            **figures_of([own.places for own in found.values()]),
            "loss": self._loss(answers, known),
        }

    def _loss(self, answers: Sequence[Any], known: Numbered) -> float:
        """The mean loss of pairs, as if each step had up to 1,000 of them."""
        pools, losses = -(-len(answers) // POOL), list[float]()
        for start in range(pools):
            rows = range(start, len(answers), pools)
            made = [torch.from_numpy(np.stack([answers[i][k] for i in rows])) for k in range(2)]
            wrong = torch.from_numpy(np.concatenate([answers[i][2:] for i in rows]))
            texts = Texts(
                torch.tensor([known.rows[i][0] for i in rows]),
                torch.tensor([known.rows[i][1] for i in rows]),
                padded([known.right[i] for i in rows], NO_TEXT),
                torch.tensor([text for i in rows for text in known.rows[i][2:]], dtype=torch.long),
            )
            losses += ranking_losses(made[0], made[1], wrong, texts, self.options.temperature).tolist()
        return float(np.mean(losses))

    def _searched(self, answers: Sequence[Any], known: Numbered) -> Iterator[tuple[int, Ranking]]:
        """Each query by number, and where its passages are among all, by the cosine."""
        vectors = {text: v for row, own in zip(known.rows, answers, strict=True) for text, v in zip(row, own, strict=True)}
        queries = list(dict.fromkeys(row[0] for row in known.rows))
        passages = list(dict.fromkeys(text for row in known.rows for text in row[1:]))
        everything = np.stack([vectors[text] for text in passages]).T
        for start in range(0, len(queries), POOL):
            some = queries[start : start + POOL]
            scores = np.stack([vectors[text] for text in some]) @ everything
            yield from _rankings(some, lambda i, scores=scores: scores[i], passages, known)  # type: ignore[misc]

    def tabled(self, answers: Sequence[Any], examples: Sequence[Example]) -> list[dict[str, str]]:
        """As `columns`; of pairs also the rank of the passage, 1 + the wrong ones before it, and the wrong one that came
        first."""
        made = super().tabled(answers, examples)
        if self.scored:
            return made
        known = numbered(examples)
        found = dict(self._searched(answers, known))
        for said, row in zip(made, known.rows, strict=True):
            own = found[row[0]]
            said |= {"rank": f"{own.ranks[row[1]]:g}", "found": known.texts[own.wrong] if own.wrong >= 0 else ""}
        return made

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Shared words, rare ones weighing more."""
        if not self.scored:
            known = numbered(test.examples)
            queries = list(dict.fromkeys(row[0] for row in known.rows))
            passages = list(dict.fromkeys(text for row in known.rows for text in row[1:]))
            search = WordSearch([known.texts[text] for text in passages])
            scores = partial(_looked_up, search, known, queries)
            places = [own.places for _, own in _rankings(queries, scores, passages, known)]
            return {"word_search": {"title": "shared words (BM25)", "rows": len(test.examples), **figures_of(places)}}
        texts = [text for e in train.examples for text in e.value]
        pairs = [text for e in test.examples for text in e.value]
        blocks = [word_overlap(texts, pairs[i : i + 2 * POOL]) for i in range(0, len(pairs), 2 * POOL)]
        made = self.metrics([pair for block in blocks for pair in block.reshape(len(block) // 2, 2, -1)], test.examples)
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
                made[: len(answer[:2]), i] = answer[:2]
        return {"text": made[0]} | ({} if np.isnan(made[1]).all() else {"text_pair": made[1]})

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """The tokens of both texts."""
        ids = [*feature["input_ids"], *feature.get("pair_ids", [])]
        return self.tokenizer.convert_ids_to_tokens(ids), [False] * len(ids)


def _split(feature: Feature) -> list[list[int]]:
    """Token ids of each text but the first."""
    ids, ends = feature.get("pair_ids", []), feature.get("ends", [])
    return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _texts(batch: Mapping[str, torch.Tensor]) -> Texts:
    return Texts(batch["queries"], batch["passages"], batch["right"], batch["negatives"])


def _looked_up(search: WordSearch, known: Numbered, queries: Sequence[int], i: int) -> np.ndarray:
    return search.scores(known.texts[queries[i]])


def _rankings(
    queries: Sequence[int], scores: Callable[[int], np.ndarray], passages: Sequence[int], known: Numbered
) -> Iterator[tuple[int, Ranking]]:
    """Each query and where its right passages are, by the scores of all passages to the `i`-th query. A passage that is the
    query itself is not looked for."""
    right = dict(zip((row[0] for row in known.rows), known.right, strict=True))
    everything = np.array(passages)
    for i, query in enumerate(queries):
        yield query, ranking(scores(i), everything, right[query], [query])
