"""Extractive question answering: the answer is a stretch of the context (SQuAD, with or without unanswerable questions).

A context longer than the model can read is cut into windows that overlap by `stride` tokens. Each window is a feature; one
that does not hold the whole answer is taught to point at its first token, which means no answer. Only tokens of the context,
and that one, can be pointed at, so padding and the question change no loss. The best stretch over all windows is the answer;
it is cut out of the context as it stands there, by the tokenizer's offsets.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from afina.core.config import option
from afina.data.clean import normalised
from afina.data.example import Column, Example, Kind
from afina.data.squad import parsed_answers, read_squad
from afina.errors import ConfigError, DataError, shortened
from afina.tasks.batches import pad_right
from afina.tasks.loading import load_base
from afina.tasks.spans import ARTICLES, best_overlap, exact_match, f1
from afina.tasks.task import IGNORED, Batch, Encoded, Feature, Figure, Rows, Task
from afina.tasks.words import need_offsets

__all__ = ["NO_ANSWER", "Found", "Question", "QuestionAnswering", "QuestionOptions"]

NO_ANSWER = "(no answer)"
_SHARE = 3  # neighbouring windows share a third of their tokens where nothing is said


@dataclass(frozen=True)
class Question:
    """A question, its context, and the answers with their first characters; `moved`: some were not where the row said."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()
    moved: bool = False


@dataclass
class Found:
    """An answer: characters `[start, end)` of the context, or none; `none` is the probability that there is none."""

    text: str
    start: int
    end: int
    probability: float
    none: float
    loss: float | None


@dataclass
class QuestionOptions:
    """Options of the task."""

    stride: int | None = option(None, "tokens that neighbouring windows share; None: a third of max_length", low=0)
    max_answer_tokens: int = option(40, "longest answer that can be given", low=1)
    language: str = option("en", "whose articles do not count in the figures; en: SQuAD's rule", choices=list(ARTICLES))


def make(row: Mapping[str, str], line: int | str) -> Example:
    """A question, its context, and its answers as `parsed_answers` takes them."""
    question, context, label = row["text"], row.get("text_pair", ""), row.get("label", "").strip()
    if question.strip() and not context.strip():
        raise ValueError("the context is empty")
    answers, moved = [], False
    for text, start in parsed_answers(label) if label else []:
        place = _placed(context, text, start)
        moved |= place != start
        inner = text.strip()
        answers.append((inner, place + text.index(inner)))
    said = ("; ".join(dict.fromkeys(text for text, _ in answers)) or NO_ANSWER) if label else ""
    value = Question(question, context, tuple(answers), moved)
    return Example(f"{question}\n{context}".strip(), said, line, value, group=normalised(context))


def _placed(context: str, text: str, start: int | None) -> int:
    """Where an answer begins: where the row says, else where it occurs, if that is once."""
    if start is not None and start >= 0 and context.startswith(text, start):
        return start
    times = sum(context.startswith(text, i) for i in range(len(context)))
    if times == 1:
        return context.index(text)
    often = f"it occurs {times} times in the context" if times else "it does not occur in the context"
    if start is None:
        raise ValueError(f"where the answer {text[:40]!r} begins is not said (answer_start), and {often}")
    there = context[max(start, 0) : max(start, 0) + len(text)]
    stands = f"{there[:40]!r} stands" if there else f"the context has ended ({len(context)} characters)"
    raise ValueError(f"the answer {text[:40]!r} is not at character {start}, where {stands}; {often}")


class QuestionAnswering(Task):
    """What the loop must know of the task."""

    name = "question_answering"
    widens = True
    task_type = "QUESTION_ANS"
    kind = Kind(
        columns={
            "text": Column("the question", ("question",), repair=False),
            "text_pair": Column("the context that holds the answer", ("context", "passage", "paragraph"), repair=False),
            "label": Column("the answers", ("answers", "answer"), structured=True, repair=False),
        },
        labels="text",
        make=make,
        read=read_squad,
    )
    figures = {
        "f1": Figure("F1"),
        "exact_match": Figure("exact match", ".1%"),
        "loss": Figure("loss", better=-1),
    }
    Options = QuestionOptions

    def __init__(self, tokenizer: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(tokenizer, options, learned)
        need_offsets(tokenizer)
        self.unanswerable = bool(self.learned.get("unanswerable"))

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """Whether some training questions have no answer (only then can that be answered), and how many answers were not
        where their row said. Raises DataError where no training question has an answer."""
        if not any(e.value.answers for e in train):
            raise DataError("no training question has an answer; there is nothing to learn")
        moved = [e.line for e in (*train, *others) if e.value.moved]
        return {"unanswerable": not all(e.value.answers for e in train), "moved": len(moved)}

    def _notes(self, questions: int, windows: int, lost: int, max_length: int) -> list[str]:
        """What was found out about the rows."""
        said = []
        if windows > questions:
            said.append(f"{questions} questions are read in {windows} windows of up to {max_length} tokens")
        if lost:
            most = self.options.max_answer_tokens
            said.append(
                f"{lost} answer{'s are' if lost > 1 else ' is'} whole in no window, or longer than {most} tokens "
                "(task.max_answer_tokens): not taught, and counted as missed"
            )
        if moved := self.learned.get("moved", 0):
            rows = f"{moved} rows have answers" if moved > 1 else "1 row has an answer"
            said.append(f"{rows} without a right answer_start, taken from the one place where the answer occurs")
        if self.unanswerable:
            said.append("some questions have no answer, so the model may answer that there is none")
        return said

    # --- model

    def load_model(self, path: str) -> Any:
        """The base with a head of two outputs for each token: the answer begins, the answer ends."""
        from transformers import AutoModelForQuestionAnswering

        return load_base(self, AutoModelForQuestionAnswering, path)

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """Windows of each context, the question before each. Examples whose answer is whole in no window, or longer than
        `max_answer_tokens`, count as truncated and have no targets."""
        questions, contexts = [e.value.question for e in examples], [e.value.context for e in examples]
        alone = self.tokenizer(questions, add_special_tokens=False)["input_ids"]
        if max_length is None:
            whole = self.tokenizer(questions, contexts, truncation=False)["input_ids"]
            max_length = min(limit, max(len(row) for row in whole))
        strides = self._strides(examples, [len(row) for row in alone], max_length)
        types = "token_type_ids" in self.tokenizer.model_input_names
        features: list[Feature] = []
        for stride in sorted(set(strides)):
            rows = [i for i, own in enumerate(strides) if own == stride]
            windows = self.tokenizer(
                [questions[i] for i in rows], [contexts[i] for i in rows], truncation="only_second", max_length=max_length,
                stride=stride, padding=False, return_overflowing_tokens=True, return_offsets_mapping=True,
                return_token_type_ids=types,
            )  # fmt: skip
            for i, row in enumerate(windows["overflow_to_sample_mapping"]):
                ids, sides = list(windows["input_ids"][i]), windows.sequence_ids(i)
                if 1 not in sides:
                    continue  # a context of nothing that the tokenizer reads; told below
                first = sides.index(1)
                last = len(sides) - sides[::-1].index(1)
                cls = self.tokenizer.cls_token_id
                feature: Feature = {
                    "input_ids": ids, "row": rows[int(row)], "context": [first, last],
                    "offsets": [letter for span in windows["offset_mapping"][i][first:last] for letter in span],
                    "null": ids.index(cls) if cls in ids else 0,
                }  # fmt: skip
                if types:
                    feature["token_type_ids"] = list(windows["token_type_ids"][i])
                features.append(feature)
        features.sort(key=lambda feature: feature["row"])  # windows of one row stay in their order
        missing = sorted(set(range(len(examples))) - {f["row"] for f in features})
        if missing:
            lines = shortened(examples[i].line for i in missing)
            raise DataError(f"{len(missing)} contexts (line {lines}) hold nothing that the tokenizer reads; remove them")
        lost = self._aim(examples, features)
        return Encoded(features, lost, max_length, self._notes(len(examples), len(features), lost, max_length))

    def _strides(self, examples: Sequence[Example], lengths: Sequence[int], max_length: int) -> list[int]:
        """Tokens that the windows of each example share: no matter which other examples are encoded with it, so that a row
        is read alike in training and when it is asked. Raises ConfigError where a question leaves no room."""
        longest = max(range(len(lengths)), key=lambda i: lengths[i])
        asked, special = self.options.stride, self.tokenizer.num_special_tokens_to_add(pair=True)
        rooms = [max_length - special - length for length in lengths]
        strides = [max(0, min(max_length // _SHARE, room // 2)) if asked is None else asked for room in rooms]
        room = rooms[longest]
        if room <= strides[longest]:
            said = "" if asked is None else f" and task.stride={asked} tokens of it are to be shared by neighbouring windows"
            raise ConfigError(
                f"windows of {max_length} tokens (training.max_length) are too short: line {examples[longest].line} has a "
                f"question of {lengths[longest]} tokens, which leaves {max(room, 0)} for the context{said}"
            )
        return strides

    def _aim(self, examples: Sequence[Example], features: list[Feature]) -> int:
        """Put the targets of labelled examples, the first of their answers, into the features; returns how many answers
        cannot be given."""
        reached: set[int] = set()
        read: dict[int, tuple[int, int]] = {}  # first and last character that any window of an example holds
        for feature in features:
            first, last = read.get(feature["row"], (feature["offsets"][0], 0))
            read[feature["row"]] = min(first, feature["offsets"][0]), max(last, feature["offsets"][-1])
        for feature in features:
            example = examples[feature["row"]]
            if example.label:
                answer = example.value.answers[0] if example.value.answers else None
                span = self._tokens(feature, answer, read[feature["row"]]) if answer else None
                feature["labels"] = list(span or (feature["null"], feature["null"]))
                if span or not answer:
                    reached.add(feature["row"])
        lost = {i for i, e in enumerate(examples) if e.label} - reached
        for feature in features:
            if feature["row"] in lost:
                feature["labels"] = [IGNORED, IGNORED]
        return len(lost)

    def _tokens(self, feature: Feature, answer: tuple[str, int], read: tuple[int, int]) -> tuple[int, int] | None:
        """The tokens of the window that an answer begins and ends in; None where it is not whole in it, or too long.

        Outside the characters `read` the tokenizer has nothing for any window (a byte order mark).
        """
        (text, start), (low, high) = answer, read
        end = start + len(text)
        begins, ends = feature["offsets"][::2], feature["offsets"][1::2]
        inside = [i for i, (a, b) in enumerate(zip(begins, ends, strict=True)) if a < end and b > start]
        if not inside or len(inside) > self.options.max_answer_tokens:
            return None
        whole = begins[0] <= max(start, low) and ends[-1] >= min(end, high)
        first = feature["context"][0]
        return (first + inside[0], first + inside[-1]) if whole else None

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Ids and mask `[rows, tokens]`; `context`: its first token and one past its last; `null`: the token that means no
        answer; labels `[rows, 2]`."""
        batch = pad_right(features, self.tokenizer.pad_token_id, self.width(features))
        batch["context"] = torch.tensor([f["context"] for f in features])
        batch["null"] = torch.tensor([f["null"] for f in features])
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([f["labels"] for f in features])
        return batch

    # --- loss

    def targets_in(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Windows with a target."""
        return float((batch["labels"][:, 0] != IGNORED).sum())

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of first and last token, their mean, summed over the windows."""
        return self._losses(self.logits(model, batch), batch).sum()

    def _losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of each window; 0 without target. Smoothing spreads over the tokens that can be pointed at."""
        chosen = batch["labels"] != IGNORED
        labels = torch.where(chosen, batch["labels"], batch["null"][:, None])
        logs = torch.log_softmax(logits, dim=-1)
        losses = -logs.gather(2, labels[:, :, None])[:, :, 0]
        if self.label_smoothing:
            open_ = logits.isfinite()
            even = -logs.masked_fill(~open_, 0.0).sum(dim=-1) / open_.sum(dim=-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * even
        return torch.where(chosen, losses, 0.0).mean(dim=1)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Scores `[rows, 2, tokens]` of being first and last, minus infinity where a token cannot be.

        Those of virtual tokens in front are left out.
        """
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        width = batch["input_ids"].shape[1]
        found = model(**inputs)
        scores = torch.stack([found.start_logits, found.end_logits], dim=1).float()[:, :, -width:]
        place = torch.arange(width, device=scores.device)
        inside = _inside(batch, width) | (place == batch["null"][:, None])
        return scores.masked_fill(~inside[:, None], -torch.inf)

    # --- answers

    def answers(self, model: Any, batch: Batch) -> list[Any]:
        """Of each window: score, first and last token of its best stretch; score of no answer; log of all; loss."""
        logits = self.logits(model, batch).double()
        width = logits.shape[2]
        inside = _inside(batch, width)
        start, end = (logits[:, side].masked_fill(~inside, -torch.inf) for side in (0, 1))
        most = self.options.max_answer_tokens
        ends = F.pad(end, (0, most - 1), value=-torch.inf).unfold(1, most, 1)  # [rows, first, tokens more]
        best, where = (start[:, :, None] + ends).flatten(1).max(dim=1)
        first = where // most
        none = logits.gather(2, batch["null"][:, None, None].expand(-1, 2, 1)).sum(dim=(1, 2))
        everything = logits.logsumexp(dim=2).sum(dim=1)
        losses: list[Any] = [None] * len(best)
        if "labels" in batch:
            known = batch["labels"][:, 0] != IGNORED
            losses = [
                loss if there else None
                for loss, there in zip(self._losses(logits, batch).tolist(), known.tolist(), strict=True)
            ]
        parts = (best, first, first + where % most, none, everything)
        return list(zip(*(part.tolist() for part in parts), losses, strict=True))

    def join(self, answers: Sequence[Any], rows: Rows) -> list[Any]:
        """The best stretch over the windows of each example; none where every window rather says so."""
        windows: list[list[tuple[Feature, Any]]] = [[] for _ in rows.examples]
        for feature, answer in zip(rows.features, answers, strict=True):
            windows[feature["row"]].append((feature, answer))
        return [self._joined(example, own) for example, own in zip(rows.examples, windows, strict=True)]

    def _joined(self, example: Example, windows: list[tuple[Feature, Any]]) -> Found:
        feature, (score, first, last, *_) = max(windows, key=lambda pair: pair[1][0])
        none = min(answer[3] for _, answer in windows)
        everything = float(np.logaddexp.reduce([answer[4] for _, answer in windows]))
        least = min(float(np.exp(answer[3] - answer[4])) for _, answer in windows)
        losses = [answer[5] for _, answer in windows if answer[5] is not None]
        loss = sum(losses) / len(losses) if losses else None
        if self.unanswerable and none > score:
            return Found("", 0, 0, least, least, loss)
        context, offset = example.value.context, feature["context"][0]
        start, end = feature["offsets"][2 * (first - offset)], feature["offsets"][2 * (last - offset) + 1]
        while start < end and context[start].isspace():
            start += 1
        while end > start and context[end - 1].isspace():
            end -= 1
        while end < len(context) and unicodedata.category(context[end])[0] == "M":
            end += 1  # accents written as letters of their own, which some tokenizers drop
        return Found(context[start:end], start, end, float(np.exp(score - everything)), least, loss)

    def metrics(self, answers: Sequence[Any], examples: Sequence[Example]) -> dict[str, Any]:
        """Exact match and F1 as SQuAD scores them, the best over the true answers; of questions with an answer and without
        apart where there are both. The loss is the mean over questions with a target."""
        language = self.options.language
        truths = [[text for text, _ in e.value.answers] for e in examples]
        exact = np.array([exact_match(a.text, t, language) for a, t in zip(answers, truths, strict=True)])
        shared = np.array([f1(a.text, t, language) for a, t in zip(answers, truths, strict=True)])
        losses = [a.loss for a in answers if a.loss is not None]
        has = np.array([bool(t) for t in truths])
        figures: dict[str, Any] = {
            "rows": len(examples),
            "loss": sum(losses) / len(losses) if losses else 0.0,
            "exact_match": float(exact.mean()),
            "f1": float(shared.mean()),
            "language": language,
        }
        if has.any() and not has.all():
            figures |= {
                name: {"rows": int(own.sum()), "exact_match": float(exact[own].mean()), "f1": float(shared[own].mean())}
                for name, own in (("with_answer", has), ("without_answer", ~has))
            }
        return figures

    def baselines(self, train: Rows, test: Rows) -> dict[str, dict[str, Any]]:
        """The stretch nearest to the question's rare words; and that nothing has an answer, where that can be."""
        guesses = []
        for example in test.examples:
            start, end = best_overlap(example.value.question, example.value.context)
            guesses.append(Found(example.value.context[start:end], start, end, 1.0, 0.0, None))
        figures = {"overlap": {"title": "words near those of the question", **self.metrics(guesses, test.examples)}}
        if self.unanswerable:
            nothing = [Found("", 0, 0, 1.0, 1.0, None)] * len(test.examples)
            figures["no_answer"] = {"title": "never an answer", **self.metrics(nothing, test.examples)}
        for made in figures.values():
            made["loss"] = None
        return figures

    def right(self, answer: Any, example: Example) -> bool:
        """Whether the answer matches a true one exactly, by SQuAD's rule."""
        return exact_match(answer.text, [text for text, _ in example.value.answers], self.options.language) == 1

    def columns(self, answer: Any, example: Example) -> dict[str, str]:
        """The answer, its place in the context, and its probability."""
        place = {"start": str(answer.start), "end": str(answer.end)} if answer.text else {"start": "", "end": ""}
        return {"answer": answer.text or NO_ANSWER, **place, "probability": f"{answer.probability:.6f}"}

    def respond(self, answer: Any, example: Example) -> dict[str, Any]:
        """The answer or null, its characters in the context, and probabilities."""
        where = {"start": answer.start, "end": answer.end} if answer.text else {"start": None, "end": None}
        none = {"no_answer_probability": answer.none} if self.unanswerable else {}
        return {"answer": answer.text or None, **where, "probability": answer.probability, **none}

    # --- what is shown

    def rendered(self, feature: Feature) -> tuple[list[str], list[bool]]:
        """The tokens of a window, and those of the answer."""
        first, last = feature.get("labels", [IGNORED, IGNORED])
        tokens = self.tokenizer.convert_ids_to_tokens(feature["input_ids"])
        return tokens, [0 <= first <= i <= last for i in range(len(tokens))]


def _inside(batch: Batch, width: int) -> torch.Tensor:
    """Tokens of the context, `[rows, tokens]`."""
    place = torch.arange(width, device=batch["context"].device)
    return (place >= batch["context"][:, :1]) & (place < batch["context"][:, 1:])
