"""What tasks have in common that make good answers likelier and bad ones rarer, measured against a reference.

A policy is a model of `causal_lm`, with the same prompts and end tokens, and answers and serves as one. Its rows hold
answers to one prompt; the log-probability of an answer is that of its tokens, its end among them, with the prompt given. A
prompt that is too long loses its beginning, equally for all answers to it.

What the reference makes of a training row never changes, so it is computed once, before the first step, and comes with the
row from then on. The base's dropout is off, in training too: a policy that has learned nothing is its reference, exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from afina.core.config import option
from afina.data.example import Example
from afina.errors import DataError
from afina.tasks.batches import pad_right, padded
from afina.tasks.causal_lm import AnswerOptions, CausalLM
from afina.tasks.head_loss import divergences, losses_and_hits, target_losses
from afina.tasks.reference import has_reference, reference, without_dropout
from afina.tasks.task import IGNORED, Batch, Encoded, Feature, Rows

__all__ = ["Policy", "PolicyOptions", "Said"]


@dataclasses.dataclass
class PolicyOptions(AnswerOptions):
    """What a recipe may say of any policy."""

    train_on: ClassVar[str] = "answers"
    generate: bool = option(False, "write answers to test rows too, before and after, and show them side by side")
    generate_rows: int = option(50, "test rows that are answered at most, the first of them", low=1)
    beta: float = option(0.1, "how much it costs to leave the reference; smaller lets the model move further", low=1e-6)


@dataclass
class Said:
    """What is known of the answers to one prompt: log-probabilities by the policy and by the reference, tokens of each,
    the divergence of the policy from the reference over all their tokens; and a text, where one was asked for."""

    policy: list[float]
    reference: list[float]
    tokens: list[int]
    divergence: float | None = 0.0  # None where there was no reference to measure it from
    text: str | None = None

    @property
    def ratios(self) -> list[float]:
        """How much likelier each answer has become: the logarithm of the ratio."""
        return [p - r for p, r in zip(self.policy, self.reference, strict=True)]


class Policy(CausalLM):
    """The interface of the tasks below it;."""

    name = ""
    Options: ClassVar[type] = PolicyOptions  # type: ignore[assignment]
    compares = True
    refers = True
    shows_before = True
    smooths = False
    widens = False

    def __init__(self, tokenizer: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(tokenizer, options, learned)
        self.untuned = bool(self.options.generate)  # type: ignore[misc]

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """Nothing: rows have one form."""
        return {"form": "answers"}

    def load_model(self, path: str) -> Any:
        """As of `causal_lm`, without dropout."""
        return without_dropout(super().load_model(path))

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Of a row "input_ids": prompt and first answer; "pair_ids": prompt and second; "answer_at": where both begin."""
        assert self.prompts is not None
        texts = []
        for example in examples:
            try:
                texts += self._texts(example)
            except DataError as error:
                raise DataError(f"line {example.line}: {error}") from error
        rows = self._tokens(texts)
        length = min(limit, max(sum(len(ids) for ids, _ in row) for row in rows)) if max_length is None else max_length
        features, place, questions, answers = list[Feature](), 0, 0, 0
        for number, example in enumerate(examples):
            count = len(example.value.answers) if example.label else 1
            own, place = rows[place : place + count], place + count
            feature, cut = self._together(own, length, asked=not example.label)
            answers, questions = answers + (cut == "answer"), questions + (cut == "question")
            if example.label and min(len(feature[key]) for key in ("input_ids", "pair_ids")[:count]) <= feature["answer_at"]:
                raise DataError(
                    f"line {example.line}: {length} tokens leave no room for an answer; raise training.max_length. It is\n"
                    f"{self.tokenizer.decode(feature['input_ids'])}"
                )
            features.append({**feature, **self._about(example), "row": number})
        return Encoded(features, questions + answers, length, self._said(questions, answers, length))

    def _texts(self, example: Example) -> list[list[tuple[str, bool]]]:
        """The prompt with each answer, cut where the answer begins; the prompt alone, where it asks."""
        assert self.prompts is not None
        messages = [dict(m) for m in example.value.messages]
        if not example.label:
            return [[(self.prompts.question(messages), False)]]
        made = []
        for answer in example.value.answers:
            *before, last = self.prompts.parts([*messages, {"role": "assistant", "content": answer}])
            made.append([("".join(text for text, _ in before), False), last])
        return made

    def _together(
        self, rows: Sequence[Sequence[tuple[list[int], bool]]], length: int, *, asked: bool
    ) -> tuple[Feature, str]:
        """One feature of a prompt's answers, and what of it was cut: "answer", "question" or ""."""
        made = [self._cut(row, length, asked=asked) for row in rows]
        begin = min(f["answer_at"] for f in made)
        head = 1 if self.begin is not None and rows[0][0][0][:1] == [self.begin] else 0
        ids = [[*f["input_ids"][:head], *f["input_ids"][head + f["answer_at"] - begin :]] for f in made]
        feature: Feature = {"input_ids": ids[0], "answer_at": begin}
        if not asked:
            feature["answered"] = 1
        if len(ids) > 1:
            feature["pair_ids"] = ids[1]
        whole = [(sum(len(tokens) for tokens, _ in row[:-1]), len(row[-1][0])) for row in rows]
        short = (len(f["input_ids"]) - f["answer_at"] < answer for f, (_, answer) in zip(made, whole, strict=True))
        if not asked and any(short):
            return feature, "answer"
        cut = any(question + (0 if asked else answer) > length for question, answer in whole)
        return feature, "question" if cut or (asked and sum(whole[0]) > length) else ""

    def _about(self, example: Example) -> Feature:
        """What else a feature holds."""
        return {}

    def _said(self, questions: int, answers: int, length: int) -> list[str]:
        template = {"own": "the tokenizer's own chat template", "plain": "### Instruction: and ### Response:",
                    "bare": "the prompt, a line break, the answer", "none": "as they stand"}  # fmt: skip
        notes = [f"prompts are put as: {template[self.learned.get('template', 'own')]}"]
        if questions:
            notes.append(f"{questions} prompts are cut from the left to {length} tokens; their answers stay whole")
        if answers:
            notes.append(f"{answers} rows have an answer that is cut at its end to fit into {length} tokens")
        return notes

    def collate(self, features: Sequence[Feature]) -> Batch:
        """All first answers and then all second ones, `[answers, tokens]`, with labels where their tokens are.

        "answer_at" `[rows]`: where a text is to be written; -1 where none is asked for. "reference" `[answers]`: the
        log-probabilities of the reference, where they are known.
        """
        keys = ("input_ids", "pair_ids") if "pair_ids" in features[0] else ("input_ids",)
        stacked = [(f[key], f["answer_at"]) for key in keys for f in features]
        batch = pad_right([{"input_ids": ids} for ids, _ in stacked], self.tokenizer.pad_token_id)
        if all("answered" in f for f in features):
            batch["labels"] = padded([[*[IGNORED] * at, *ids[at:]] for ids, at in stacked], IGNORED)
        batch["answer_at"] = torch.tensor([f["answer_at"] if self._asked(f) else -1 for f in features])
        if "reference" in features[0]:
            known = [[f["reference"][i] for f in features] for i in range(len(keys))]
            batch["reference"] = torch.tensor(known, dtype=torch.float64).flatten()
        return batch

    def _asked(self, feature: Feature) -> bool:
        return "answered" not in feature or (self.options.generate and feature["row"] < self.options.generate_rows)

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Its rows."""
        return float(len(batch["answer_at"]))

    # --- log-probabilities

    def log_probs(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each answer, summed over its tokens, and how many these are; `[answers]`, float32."""
        aim = self.aim(batch)
        losses = target_losses(model, self.inputs(batch), aim)
        count = len(batch["input_ids"])
        made = losses.new_zeros(count).index_add(0, aim.rows, -losses)
        return made, losses.new_zeros(count).index_add(0, aim.rows, torch.ones_like(losses))

    def referred(self, model: Any, batch: Batch) -> torch.Tensor:
        """Log-probabilities of the reference `[answers]`, float32: known ones, or computed."""
        if "reference" in batch:
            return batch["reference"].float()
        with reference(model):
            return self.log_probs(model, batch)[0]

    def reference_answers(self, model: Any, batch: Batch) -> list[list[float]]:
        """What the reference makes of each feature, for `knowing`."""
        made = self.referred(model, batch)
        return made.view(-1, len(batch["answer_at"])).T.double().tolist()  # type: ignore[no-any-return]

    # --- answers

    @torch.no_grad()
    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """Log-probabilities of each row's answers, and how far the policy is from its reference at their tokens."""
        rows = len(batch["answer_at"])
        if "labels" not in batch:
            return [Said([], [], []) for _ in range(rows)]
        if not has_reference(model):
            policy, tokens = self.log_probs(model, batch)
            known = self.referred(model, batch) if self.refers else torch.zeros_like(policy)
            by_row = (values.view(-1, rows).T.tolist() for values in (policy, known, tokens))
            return [Said(p, r, [int(n) for n in count], None) for p, r, count in zip(*by_row, strict=True)]
        aim = self.aim(batch)
        own, other, apart = divergences(model, self.inputs(batch), aim, partial(reference, model))
        count = len(batch["input_ids"])

        def summed(values: torch.Tensor) -> list[list[float]]:
            made = values.new_zeros(count).index_add(0, aim.rows, values)
            return made.view(-1, rows).T.tolist()  # type: ignore[no-any-return]

        made = zip(summed(-own), summed(-other), summed(torch.ones_like(own)), summed(apart), strict=True)
        return [Said(p, r, [int(n) for n in tokens], sum(d)) for p, r, tokens, d in made]

    def join(self, answers: Sequence[Any], rows: Rows) -> list[Any]:
        """A feature is an example."""
        return list(answers)

    def far(self, answers: Sequence[Any]) -> float | None:
        """The divergence from the reference per token, over the whole vocabulary; None where there was no reference."""
        if any(a.divergence is None for a in answers):
            return None
        return sum(a.divergence for a in answers) / max(1, sum(sum(a.tokens) for a in answers))

    def written(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """How many texts were written."""
        count = sum(a.text is not None for a in answers)
        return {"written": count} if count else {}

    @torch.no_grad()
    def outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """The probability of each target token, in order."""
        return torch.exp(-losses_and_hits(model, self.inputs(batch), self.aim(batch))[0])

    # --- what is shown

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """The first answer after its prompt."""
        ids = feature["input_ids"]
        return self.tokenizer.convert_ids_to_tokens(ids), [place >= feature["answer_at"] for place in range(len(ids))]
