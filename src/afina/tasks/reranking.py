"""Which of a query's candidates answer it? A reranker reads query and passage together and gives one number.

It is slower than vectors, since nothing can be computed before the query is there, and better, since each word of the one
is read beside each word of the other; so it puts the first finds of a search in order. A row is a query with its right
passage and a list of wrong ones, or a query with one candidate and 1 or 0. What is trained on:

  - pairwise: the right passage is to score higher than each wrong one of its row (RankNet,
    https://doi.org/10.1145/1102351.1102363), the mean over the wrong ones, so that long lists weigh no more;
  - pointwise: each candidate by itself is right or wrong (cross-entropy).

It is measured by the order of the candidates that each query is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from afina.core.config import option
from afina.data.clean import normalised
from afina.data.example import Column, Example, Kind
from afina.errors import DataError, shortened
from afina.tasks.batches import pad_right
from afina.tasks.loading import load_base
from afina.tasks.passages import NEGATIVES, PASSAGES, QUERIES, Numbered, numbered, passages_in
from afina.tasks.retrieval import RECALLS, Ranking, figures_of, ranking
from afina.tasks.task import Batch, Encoded, Feature, Figure, Rows, Task
from afina.tasks.word_search import WordSearch

__all__ = ["Reranking", "RerankingOptions"]

RIGHT = {"1": True}
_READ = 64  # pairs that are read at once where nothing is learned


@dataclasses.dataclass
class RerankingOptions:
    """What is learned."""

    objective: str = option(
        "auto", "pairwise: right above wrong; pointwise: each by itself; auto: pairwise where every row has wrong passages",
        choices=("auto", "pairwise", "pointwise"),
    )  # fmt: skip


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A query with its right passage and wrong ones, or with one candidate that is right (1) or wrong (0)."""
    query, passage, label = row["text"], row.get("text_pair", ""), row.get("label", "1")
    wrong = passages_in(row.get("negatives", ""))
    if label not in ("", "0", "1"):
        raise ValueError(f"the label is {label[:40]!r}; expected 1 for a right passage and 0 for a wrong one")
    if label == "0" and wrong:
        raise ValueError("the row names wrong passages and is itself labelled 0; give wrong passages rows of their own")
    text = f"{query}\n{passage}" if query and passage else ""
    return Example(text, label, line, (query, passage, *wrong), group=normalised(query))


class Reranking(Task):
    """The candidates of a query in order, the right ones first."""

    name = "reranking"
    task_type = "SEQ_CLS"
    kind = Kind(
        columns={
            "text": Column("the query", QUERIES),
            "text_pair": Column("a passage", PASSAGES),
            "negatives": NEGATIVES,
            "label": Column("1 where the passage answers the query, 0 where not; without the column all do",
                            ("label", "relevant", "relevance"), required=False),
        },
        labels="number",
        make=make,
    )  # fmt: skip
    figures = {
        "ndcg_at_10": Figure("nDCG@10"),
        "mrr_at_10": Figure("MRR@10"),
        **{f"recall_at_{k}": Figure(f"recall@{k}", ".1%") for k in RECALLS},
        "loss": Figure("loss", better=-1),
    }
    smooths = False
    Options = RerankingOptions
    options: RerankingOptions

    def __init__(self, tokenizer: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(tokenizer, options, learned)
        bare = self.learned.get("bare", [])
        if self.options.objective == "pairwise" and bare:
            raise DataError(
                f"task.objective=pairwise: {self.learned['bare_rows']} rows have no wrong passage to be above "
                f"(line {shortened(bare, 5)}); name them with data.negatives, or say task.objective=pointwise"
            )
        self.pairwise = not bare and self.options.objective != "pointwise"

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """The first lines of the rows without a wrong passage."""
        bare = [e.line for e in (*train, *others) if not e.value[2:]]
        there = {"right": any(e.label == "1" for e in train), "wrong": any(e.label == "0" or e.value[2:] for e in train)}
        if lacking := [name for name, found in there.items() if not found]:
            raise DataError(
                f"the training rows have no {lacking[0]} passage, so there is nothing to tell apart; name wrong passages "
                "with data.negatives (a text or a list a row), or a column of 1 and 0 with data.label"
            )
        return {"bare": bare[:5], "bare_rows": len(bare)}

    # --- model

    def load_model(self, path: str) -> Any:
        """The base with a head of one output."""
        from transformers import AutoModelForSequenceClassification

        return load_base(self, AutoModelForSequenceClassification, path, num_labels=1)

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Query and passage as one, once a candidate, the longer of the two cut off at `max_length`."""
        pairs = [(e.value[0], passage) for e in examples for passage in e.value[1:]]
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
        whole = self.tokenizer(first, second, truncation=False, padding=False)
        long = [len(row) for row in whole["input_ids"]]
        length = min(limit, max(long)) if max_length is None else max_length
        if max(long) > length:
            whole = self.tokenizer(first, second, truncation=True, max_length=length, padding=False)
        known, place, cut = numbered(examples, RIGHT), 0, 0
        features: list[Feature] = []
        for i, example in enumerate(examples):
            own = range(place, place + len(example.value) - 1)
            ids = [self._trimmed(list(whole["input_ids"][n])) for n in own]
            feature: Feature = {"input_ids": ids[0], "row": i, "ends": np.cumsum([len(x) for x in ids]).tolist()}
            feature["pair_ids"] = [token for x in ids[1:] for token in x]
            if "token_type_ids" in whole:
                feature["types"] = [t for n, x in zip(own, ids, strict=True) for t in whole["token_type_ids"][n][: len(x)]]
            if example.label:
                right = known.right[i]
                feature["targets"] = [int(text in right) for text in known.rows[i][1:]]
            cut += any(long[n] > length for n in own)
            place += len(own)
            features.append(feature)
        return Encoded(features, cut, length, known.notes(examples))

    def _trimmed(self, row: list[int]) -> list[int]:
        """A decoder's head reads the last token that is no padding."""
        while len(row) > 1 and row[-1] == self.tokenizer.pad_token_id:
            row.pop()
        return row

    def collate(self, features: Sequence[Feature]) -> Batch:
        """All candidates of all rows `[pairs, tokens]`; `owner [pairs]`: of which row; `first [rows]`: where it begins."""
        pairs, owner, first = list[Feature](), list[int](), list[int]()
        for n, f in enumerate(features):
            ids, ends = [*f["input_ids"], *f["pair_ids"]], f["ends"]
            first.append(len(pairs))
            for a, b in zip([0, *ends], ends, strict=False):
                types = {"token_type_ids": f["types"][a:b]} if "types" in f else {}
                pairs.append({"input_ids": ids[a:b], **types})
                owner.append(n)
        batch = pad_right(pairs, self.tokenizer.pad_token_id)
        batch |= {"owner": torch.tensor(owner), "first": torch.tensor(first)}
        if "targets" in features[0]:
            batch["labels"] = torch.tensor([float(t) for f in features for t in f["targets"]])
        return batch

    # --- loss

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its rows, or of single candidates these."""
        return float(len(batch["first"] if self.pairwise else batch["owner"]))

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """The number of each candidate `[pairs]`, float32."""
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        return model(**inputs).logits.squeeze(-1).float()  # type: ignore[no-any-return]

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Summed over rows, or over candidates."""
        return self._losses(self.logits(model, batch), batch["labels"], batch["owner"], batch["first"]).sum()

    def _losses(self, scores: torch.Tensor, labels: torch.Tensor, owner: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """What each candidate adds `[pairs]`."""
        if not self.pairwise:
            return F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
        wrong = (labels == 0).to(scores.dtype)
        counts = torch.zeros(len(first), dtype=scores.dtype, device=scores.device).index_add(0, owner, wrong)
        return F.softplus(scores - scores[first][owner]) * wrong / counts[owner].clamp(min=1)

    # --- answers

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """The numbers of the candidates of each row `[candidates]`, float64; a few candidates are read at a time (T32)."""
        inputs: Batch = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        stretches: list[Batch] = [
            {k: v[i : i + _READ] for k, v in inputs.items()} for i in range(0, len(batch["owner"]), _READ)
        ]
        made = torch.cat([self.logits(model, some) for some in stretches]).double().cpu().numpy()
        return np.split(made, batch["first"].tolist()[1:])

    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """The scores `[pairs]`, between 0 and 1."""
        return torch.sigmoid(self.logits(model, batch).double())

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """The order of the candidates of each query; queries whose candidates are all right or all wrong say nothing."""
        known = numbered(examples, RIGHT)
        found = [own.places for _, own in self._ordered(answers, known) if own.wrong >= 0 and len(own.places)]
        queries = len({row[0] for row in known.rows})
        of_search: dict[str, Any] = figures_of(found) if found else {"queries": 0, **dict.fromkeys(self.figures)}
        scores, labels, owner, first = (torch.from_numpy(np.array(x)) for x in self._flat(answers, known))
        losses = self._losses(scores, labels, owner, first)
        count = len(first) if self.pairwise else len(owner)
        return {
            "rows": len(examples),
            "candidates": sum(len(row) - 1 for row in known.rows),
            **of_search,
            "queries_left_out": queries - len(found),
            "loss": float(losses.sum()) / count,
        }

    @staticmethod
    def _flat(answers: Sequence[Any], known: Numbered) -> tuple[list[Any], ...]:
        """Scores, labels and rows of all candidates, and where each row begins."""
        scores = [float(s) for own in answers for s in own]
        labels = [float(t in right) for row, right in zip(known.rows, known.right, strict=True) for t in row[1:]]
        owner = [n for n, row in enumerate(known.rows) for _ in row[1:]]
        return scores, labels, owner, np.cumsum([0, *(len(row) - 1 for row in known.rows[:-1])]).tolist()

    @staticmethod
    def _ordered(answers: Sequence[Any], known: Numbered) -> Iterator[tuple[int, Ranking]]:
        """Each query by number, and where its right passages are among its candidates."""
        scores: dict[int, dict[int, float]] = {}
        for row, own in zip(known.rows, answers, strict=True):
            scores.setdefault(row[0], {}).update(zip(row[1:], map(float, own), strict=True))
        right = dict(zip((row[0] for row in known.rows), known.right, strict=True))
        for query, own in scores.items():
            yield query, ranking(np.array(list(own.values())), np.array(list(own)), right[query])

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Shared words, rare ones weighing more."""
        known = numbered(test.examples, RIGHT)
        search = WordSearch(known.texts)
        answers = [search.scores(known.texts[row[0]])[row[1:]] for row in known.rows]
        made = self.metrics(answers, test.examples)
        return {"word_search": {"title": "shared words (BM25)", **{k: v for k, v in made.items() if k != "loss"}}}

    def tabled(self, answers: Sequence[Any], examples: Sequence[Example]) -> list[dict[str, str]]:
        """As `columns`; of right passages also the rank, 1 + the wrong ones before it, and the wrong one that came first."""
        known = numbered(examples, RIGHT)
        found = dict(self._ordered(answers, known))
        made = super().tabled(answers, examples)
        for said, row in zip(made, known.rows, strict=True):
            own = found[row[0]]
            there = row[1] in own.ranks and own.wrong >= 0
            said |= {"rank": f"{own.ranks[row[1]]:g}" if there else "", "found": known.texts[own.wrong] if there else ""}
        return made

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The score of the passage, between 0 and 1: of use beside those of other passages of the same query."""
        return {"answer": f"{self.respond(answer, example)['score']:.6f}"}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """As `columns`."""
        return {"score": float(torch.sigmoid(torch.tensor(answer[0], dtype=torch.float64)))}
