"""One label a text: encoders with a head on the first token, decoders with a head on the last.

Batches are always padded on the right and masked by position, whatever the tokenizer says of its padding side: a decoder
that pools the last token finds it by the first padding id (T22), and a padding token that is also the end token must not
be taken for text (T20).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from afina.errors import ConfigError, DataError, shortened
from afina.tasks.baselines import majority, word_counts
from afina.tasks.metrics import classification_metrics

__all__ = ["Encoded", "SequenceClassification"]

Batch = dict[str, torch.Tensor]
_NO_LIMIT = 1_000_000  # tokenizers without a limit name an absurd one


@dataclass
class Encoded:
    """Texts as token ids, and how many of them were cut off."""

    ids: list[list[int]]
    truncated: int
    max_length: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(row) for row in self.ids]


class SequenceClassification:
    """What the loop must know of the task."""

    name = "sequence_classification"
    task_type = "SEQ_CLS"
    label_smoothing = 0.0  # of the training loss; figures do not know it

    def __init__(self, labels: Sequence[str], tokenizer: Any):
        self.labels = list(labels)
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ConfigError("the tokenizer has neither a padding, an end nor an unknown token, so rows cannot be padded")

    # --- model

    def load_model(self, path: str) -> Any:
        """The base with a head of one output a label. Raises ConfigError where weights below the head are missing."""
        from transformers import AutoModelForSequenceClassification

        names = dict(enumerate(self.labels))
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=len(self.labels),
                id2label=names,
                label2id={label: i for i, label in names.items()},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head for other labels is replaced; anything else is refused below
                dtype=torch.float32,
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ConfigError(f"model {path}: transformers has no classifier for this architecture") from error
        heads = _head_prefixes(model)
        mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"] if not str(entry[0]).startswith(heads))
        if mismatched:
            raise ConfigError(f"model {path}: weights of another shape than its configuration says: {shortened(mismatched)}")
        below = sorted(k for k in info["missing_keys"] if not k.startswith(heads) and ".pooler." not in f".{k}")
        if below:
            raise ConfigError(f"model {path}: the checkpoint lacks weights below the head: {shortened(below)}")
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    # --- rows

    def limit(self, model: Any) -> int:
        """The most tokens that model and tokenizer can take."""
        positions = getattr(model.config, "max_position_embeddings", None) or _NO_LIMIT
        return int(min(positions, self.tokenizer.model_max_length or _NO_LIMIT))

    def encode(self, texts: Sequence[str], max_length: int | None, limit: int) -> Encoded:
        """Token ids of every text, cut to `max_length`; None: to the longest, up to `limit`."""
        whole = self.tokenizer(list(texts), truncation=False, padding=False, add_special_tokens=True)["input_ids"]
        longest = max(len(row) for row in whole)
        length = min(limit, longest) if max_length is None else max_length
        cut = sum(len(row) > length for row in whole)
        if cut:
            whole = self.tokenizer(list(texts), truncation=True, max_length=length, padding=False)["input_ids"]
        ids = [self._without_trailing_pads(list(row)) for row in whole]
        empty = [text for text, row in zip(texts, ids, strict=True) if not row]
        if empty:
            raise DataError(f"{len(empty)} texts have no token at all, for example {empty[0]!r}")
        return Encoded(ids, cut, length)

    def _without_trailing_pads(self, row: list[int]) -> list[int]:
        """An end token that is also the padding token would be pooled over: every text ends at its last real token."""
        while row and row[-1] == self.tokenizer.pad_token_id:
            row.pop()
        return row

    def collate(self, rows: Sequence[Sequence[int]], targets: Sequence[int] | None = None) -> Batch:
        """One batch, padded on the right: ids, mask `[rows, tokens]` and, where given, labels `[rows]`."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), int(self.tokenizer.pad_token_id), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        return batch if targets is None else {**batch, "labels": torch.tensor(targets, dtype=torch.long)}

    # --- loss and answers

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> int:
        """How many targets a batch holds: its rows."""
        return int(batch["labels"].numel())

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy, summed over the targets of the batch; the step divides by all its targets (T25)."""
        logits, labels = self.logits(model, batch), batch["labels"]
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Scores `[rows, classes]` in float32."""
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()  # type: ignore[no-any-return]

    # --- figures

    def metrics(self, probabilities: np.ndarray, targets: Sequence[int]) -> dict[str, Any]:
        """See `classification_metrics`."""
        return classification_metrics(probabilities, targets, self.labels)

    def baselines(
        self, train_texts: Sequence[str], train: Sequence[int], texts: Sequence[str], targets: Sequence[int]
    ) -> dict[str, dict[str, Any]]:
        """The same figures for answers that need no model."""
        n = len(self.labels)
        return {
            "majority": self.metrics(majority(train, len(texts), n), targets),
            "word_counts": self.metrics(word_counts(train_texts, train, texts, n), targets),
        }


def _head_prefixes(model: Any) -> tuple[str, ...]:
    """Everything outside the base model proper."""
    base = model.base_model_prefix
    return tuple(f"{name}." for name, _ in model.named_children() if name != base)
