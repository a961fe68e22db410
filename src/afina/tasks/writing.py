"""What tasks whose answer is text have in common: the loss per target token, its streaming figures, and written answers.

Logits of a vocabulary are the largest tensors of such a task. They are made where a target is foretold and nowhere else,
chunk by chunk inside the output head (`head_loss`), and nothing of them but three numbers a row outlives its chunk (T32).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from afina.data.clean import normalised
from afina.data.example import Example
from afina.errors import ConfigError
from afina.tasks.generation import generated
from afina.tasks.head_loss import Aim, loss_sum, losses_and_hits, why_whole
from afina.tasks.task import IGNORED, Batch, Rows, Task

__all__ = ["Foretold", "WritingTask", "Written", "perplexity"]


@dataclass
class Foretold:
    """The targets of one feature: negative log likelihood, summed; how many there are; how many came out likeliest."""

    loss: float = 0.0
    tokens: int = 0
    right: int = 0


@dataclass
class Written:
    """The answer to one example: what is known of its targets, and the text, where one was asked for."""

    foretold: Foretold = field(default_factory=Foretold)
    text: str | None = None


class WritingTask(Task):
    """A task whose answer is text."""

    untuned = True

    def __init__(self, processor: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(processor, options, learned)
        if self.tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer has no end token, so the model could not learn to stop; {self.name} needs a model that "
                "writes, such as t5-small for seq2seq or gpt2 for causal_lm"
            )
        if not self.options.generate:
            self.figures = {key: f for key, f in self.figures.items() if not f.final}  # type: ignore[misc]

    @abstractmethod
    def aim(self, batch: Mapping[str, torch.Tensor]) -> Aim:
        """Where the targets of a batch are foretold."""

    @abstractmethod
    def inputs(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """What the model is called with to foretell them."""

    @abstractmethod
    def questions(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Token ids and mask to write on from, and the row of the batch each belongs to; none where none is asked."""

    @abstractmethod
    def room(self, model: Any, width: int) -> int:
        """How many tokens can be written after questions of `width` tokens."""

    @abstractmethod
    def ends(self, model: Any) -> list[int]:
        """Tokens that end an answer."""

    def rows_in(self, batch: Mapping[str, torch.Tensor]) -> int:
        """How many rows a batch has."""
        return len(batch["input_ids"])

    # --- training

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the targets, summed."""
        return loss_sum(model, self.inputs(batch), self.aim(batch), label_smoothing=self.label_smoothing)

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its target tokens."""
        return float((batch["labels"] != IGNORED).sum())

    def paths(self, model: Any) -> list[str]:
        """Whether logits have to be made whole, and why."""
        why = why_whole(model)
        return [f"{why}: logits are made whole, for every place of a row, which takes more memory"] if why else []

    # --- answers

    @torch.no_grad()
    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """What is foretold of the targets of each feature; nothing is written."""
        made = [Written() for _ in range(self.rows_in(batch))]
        if "labels" not in batch:
            return made
        aim = self.aim(batch)
        losses, right = losses_and_hits(model, self.inputs(batch), aim)
        for row, loss, hit in zip(aim.rows.tolist(), losses.tolist(), right.tolist(), strict=True):
            one = made[row].foretold
            one.loss, one.tokens, one.right = one.loss + loss, one.tokens + 1, one.right + hit
        return made

    @torch.no_grad()
    def final_answers(self, model: Any, batch: Batch) -> list[Any]:
        """As `answers`, with the text of every row that is asked for one."""
        made = self.answers(model, batch)
        ids, mask, rows = self.questions(model, batch)
        if rows:
            length = min(self.options.max_new_tokens, self.room(model, ids.shape[1]))
            texts = generated(
                model, ids, mask, max_new_tokens=length, num_beams=self.options.num_beams, ends=self.ends(model),
                pad=self.tokenizer.pad_token_id,
            )  # fmt: skip
            for row, tokens in zip(rows, texts, strict=True):
                made[row].text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return made

    def join(self, answers: Sequence[Any], rows: Rows) -> list[Any]:
        """The features of an example together."""
        joined = [Written() for _ in rows.examples]
        for answer, feature in zip(answers, rows.features, strict=True):
            whole, part = joined[feature["row"]], answer.foretold
            f = whole.foretold
            f.loss, f.tokens, f.right = f.loss + part.loss, f.tokens + part.tokens, f.right + part.right
            whole.text = answer.text if whole.text is None else whole.text
        return joined

    @abstractmethod
    def text_figures(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Figures of written answers; each has one or more references."""

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """Loss per target token (natural logarithm), perplexity, share of tokens foretold; of written texts, `text_figures`.

        Rows that ask the same count once among the written ones: their labels are the references of one answer.
        """
        foretold = [a.foretold for a in answers]
        tokens = sum(f.tokens for f in foretold)
        loss = sum(f.loss for f in foretold) / max(tokens, 1)
        figures: dict[str, Any] = {
            "rows": len(examples),
            "tokens": tokens,
            "loss": loss,
            "perplexity": perplexity(loss),
            "token_accuracy": sum(f.right for f in foretold) / max(tokens, 1),
        }
        return {**figures, **self._of_texts([a.text for a in answers], examples)}

    def _of_texts(self, texts: Sequence[str | None], examples: Sequence[Example]) -> dict[str, Any]:
        references: dict[str, list[str]] = {}
        for example in examples:
            references.setdefault(normalised(example.text), []).append(self.reference(example))
        said = {normalised(e.text): text for e, text in zip(examples, texts, strict=True) if text is not None and e.label}
        if not said:
            return {}
        return {"written": len(said), **self.text_figures(list(said.values()), [references[key] for key in said])}

    def reference(self, example: Example) -> str:
        """The text that is expected."""
        return example.label

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """Tokens as frequent as in training, whatever the text says."""
        counts: Counter[int] = Counter()
        for feature in train.features:
            counts.update(token for token in feature["labels"] if token != IGNORED)
        total, kinds = sum(counts.values()), len(self.tokenizer)
        tokens = [t for feature in test.features for t in feature["labels"] if t != IGNORED]
        loss = sum(-math.log((counts[t] + 1) / (total + kinds)) for t in tokens) / max(len(tokens), 1)  # add-one smoothing
        commonest = max(counts, key=lambda t: (counts[t], -t), default=None)
        figures = {
            "title": "tokens as frequent as in training",
            "rows": len(test.examples),
            "tokens": len(tokens),
            "loss": loss,
            "perplexity": perplexity(loss),
            "token_accuracy": sum(t == commonest for t in tokens) / max(len(tokens), 1),
        }
        return {"frequencies": figures}

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The written text; loss and number of the target tokens, where there are some."""
        known = answer.foretold
        loss = {"loss": f"{known.loss / known.tokens:.6f}", "tokens": str(known.tokens)} if known.tokens else {}
        return {"answer": answer.text or "", **loss}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The written text."""
        return {"answer": answer.text or ""}

    @torch.no_grad()
    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """The probability of each target token, in order."""
        return torch.exp(-losses_and_hits(model, self.inputs(batch), self.aim(batch))[0])


def perplexity(loss: float) -> float:
    """What the loss per token amounts to: choosing among so many equally likely tokens."""
    return math.exp(min(loss, 700.0))
