"""Continuing text: instructions, conversations, prompts with completions, and plain text (continued pre-training).

What stands in a row is found from its columns (`conversations`). The answers alone are supervised, each with its end token;
of a text alone, every token is. Targets are told by position, never by token: a padding token that is the end token, too,
is learned where it ends an answer and ignored where it pads (T20). A tokenizer's begin token stands once, in front (T24).

Where an example is too long, its question is cut from the left, so that the answer stays whole with its end and what stands
next to it; only an answer that is too long by itself loses its own end, and then no end token is taught there. A text alone
is never cut off but into pieces: each begins with the last token of the piece before, so that every token is foretold once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from afina.core.config import option
from afina.data.example import Example
from afina.errors import ConfigError, DataError
from afina.fast.packing import packed
from afina.tasks.batches import pad_right, padded
from afina.tasks.conversations import CONVERSATIONS, question_of
from afina.tasks.generation import left_padded
from afina.tasks.head_loss import Aim, loss_sum, supervised
from afina.tasks.loading import load_base
from afina.tasks.prompts import TEMPLATES, Prompts, begin_token
from afina.tasks.task import IGNORED, Batch, Encoded, Feature, Figure
from afina.tasks.text_metrics import check_libraries, overlap_figures
from afina.tasks.writing import WritingTask

__all__ = ["AnswerOptions", "CausalLM"]

_PIECE = 1024  # longest piece of a text where max_length is not said: memory, not the model, sets the limit
_BESIDE = 4  # of an answer that is too long, one part in so many of the tokens is left to the question


@dataclasses.dataclass
class AnswerOptions:
    """How prompts are put and answered, in every task whose model answers as this one."""

    template: str = option(
        "own", "how prompts are put: by the tokenizer's own chat template, or plain where it has none; plain "
        "(### Instruction: and ### Response:); bare (the prompt, a line break, the answer)", choices=("own", *TEMPLATES),
    )  # fmt: skip
    generate: bool = option(False, "write answers to test rows too and compare them with those expected")
    generate_rows: int = option(200, "test rows that are answered at most, the first of them", low=1)
    max_new_tokens: int = option(128, "tokens of a written answer at most, as far as the model's positions go", low=1)
    num_beams: int = option(1, "answers that are followed at once; 1 takes the likeliest token each time", low=1)


@dataclasses.dataclass
class Options(AnswerOptions):
    """What a recipe may say of it."""

    train_on: str = option("answers", "tokens that are learned: of the answers, or all", choices=("answers", "all"))


class CausalLM(WritingTask):
    """Continuing text: instructions, conversations, prompts with completions, and plain text."""

    name = "causal_lm"
    widens = True
    task_type = "CAUSAL_LM"
    packs = True
    kind = CONVERSATIONS
    figures = {
        "loss": Figure("loss per token", better=-1),
        "perplexity": Figure("perplexity", ".2f", better=-1),
        "token_accuracy": Figure("tokens foretold", ".1%"),
        "rouge_l": Figure("ROUGE-L", final=True),
        "exact_match": Figure("exactly right", ".1%", final=True),
    }
    Options = Options

    def __init__(self, tokenizer: Any, options: Any = None, learned: Mapping[str, Any] | None = None):
        super().__init__(tokenizer, options, learned)
        self.begin = begin_token(tokenizer)
        self.prompts: Prompts | None = None
        if self.learned.get("form") != "text":
            self.prompts = self._prompts()
        elif self.options.generate:
            raise ConfigError("task.generate: rows that are a text alone have no answer to compare with; leave it out")
        if any(figure.final for figure in self.figures.values()):
            check_libraries("rouge_score")

    def _prompts(self) -> Prompts:
        """With the chat template that rows are rendered with: it is kept by the tokenizer and saved with the task."""
        if "chat_template" not in self.learned:
            name, template = self.options.template, self.tokenizer.chat_template
            if name != "own" or template is None:
                name = "plain" if name == "own" else name
                template = ("{{ bos_token }}" if self.begin is not None else "") + TEMPLATES.get(name, TEMPLATES["bare"])
            self.learned |= {"template": name, "chat_template": template}
        self.tokenizer.chat_template = self.learned["chat_template"]
        return Prompts(self.tokenizer)

    @classmethod
    def learn(cls, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
        """Whether rows are conversations or a text alone."""
        kinds = {example.value is None for example in (*train, *others)}
        if len(kinds) > 1:
            alone = next(e.line for e in (*train, *others) if e.value is None)
            raise DataError(f"some rows are conversations and others (line {alone}) a text alone; give them in one form")
        return {"form": "text" if kinds == {True} else "answers"}

    # --- model

    def load_model(self, path: str) -> Any:
        """The base, of which nothing may be missing. Raises ConfigError for an encoder, too."""
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        model = load_base(self, AutoModelForCausalLM, path, heads=())
        masked = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if masked and not self.storage.empty and _looks_ahead(model):
            raise ConfigError(
                f"model {path}: {type(model).__name__} sees the tokens that follow, so it would foretell what it reads; "
                "take a model that was trained to continue text"
            )
        return model

    def ends(self, model: Any) -> list[int]:
        """The tokenizer's end token, the template's, and those the checkpoint itself stops at."""
        own = model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        if self.prompts is not None and self.prompts.end is not None:
            ends.add(self.tokenizer.convert_tokens_to_ids(self.prompts.end))
        return sorted(end for end in ends if end is not None)

    def asked_length(self, trained: int, limit: int) -> int:
        """All that the model can take: a question that lost its beginning would be answered wrongly."""
        return limit

    # --- rows

    def encode(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        """See the module. Without `max_length`, texts are cut into pieces of at most 1024 tokens.

        Raises DataError with the rendered example where one has nothing to be learned.
        """
        if self.prompts is None:
            return self._pieces(examples, max_length, limit)
        rows = self._tokens([self._parts(example) for example in examples])
        longest = max(sum(len(ids) for ids, _ in row) for row in rows)
        length = min(limit, longest) if max_length is None else max_length
        features, questions, answers = list[Feature](), 0, 0
        for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
            whole = sum(len(ids) for ids, _ in row)
            asked = _asks(example)
            feature = self._cut(row, length, asked=asked)
            kept_answer = len(feature["input_ids"]) - feature["answer_at"]
            if whole > length:
                cut_answer = not asked and kept_answer < len(row[-1][0])
                answers, questions = answers + cut_answer, questions + (not cut_answer)
            if not asked and not any(label != IGNORED for label in feature["labels"]):
                raise DataError(
                    f"line {example.line}: no token of this example is a target, so nothing would be learned of it. It is\n"
                    f"{self.tokenizer.decode(feature['input_ids'])}"
                )
            features.append({**feature, "row": number})
        return Encoded(features, questions + answers, length, self._notes(examples, questions, answers, length))

    def _notes(self, examples: Sequence[Example], questions: int, answers: int, length: int) -> list[str]:
        turns = sum(m["role"] == "assistant" for e in examples for m in e.value or ())
        template = {
            "own": "the tokenizer's own chat template", "plain": "### Instruction: and ### Response:",
            "bare": "the question, a line break, the answer",
        }[self.learned.get("template", "own")]  # fmt: skip
        learned = "all tokens are" if self.options.train_on == "all" else "the answers alone are"
        notes = [f"rows are conversations with {turns} answers; put as: {template}; {learned} learned"]
        if questions:
            notes.append(f"{questions} questions are cut from the left to {length} tokens; their answers stay whole")
        if answers:
            notes.append(f"{answers} answers are cut at their end to fit into {length} tokens; no end is learned there")
        return notes

    def _parts(self, example: Example) -> list[tuple[str, bool]]:
        """The example as text, answers marked; up to where the answer begins, where it has no label."""
        assert self.prompts is not None
        if _asks(example):
            return [(self.prompts.question(question_of(example)), False)]
        try:
            return self.prompts.parts(example.value)
        except DataError as error:
            raise DataError(f"line {example.line}: {error}") from error

    def _tokens(self, rows: Sequence[Sequence[tuple[str, bool]]]) -> list[list[tuple[list[int], bool]]]:
        """Token ids of each part by itself, as a question is tokenised when its answer is not known; one begin token."""
        texts = [text for row in rows for text, _ in row]
        ids = iter(self.tokenizer(texts, add_special_tokens=False, padding=False, verbose=False)["input_ids"])
        made = []
        for row in rows:
            parts = [(list(next(ids)), learned) for _, learned in row]
            if self.tokenizer.bos_token is not None:
                parts = [(self._begun(text, tokens, learned, first=not i), learned)
                         for i, ((text, learned), (tokens, _)) in enumerate(zip(row, parts, strict=True))]  # fmt: skip
            made.append(parts)
        return made

    def _begun(self, text: str, tokens: list[int], learned: bool, *, first: bool) -> list[int]:
        """The begin token: once in front where the tokenizer or the template puts one, never between question and answer."""
        begin, mark = self.tokenizer.bos_token_id, self.tokenizer.bos_token
        count = next((i for i, token in enumerate(tokens) if token != begin), len(tokens))
        between = text.startswith(mark) if learned else text.rstrip().endswith(mark) and text.strip() != mark
        if between and mark != self.tokenizer.eos_token:
            raise DataError(
                f"the chat template puts the begin token {mark!r} between a question and its answer (T24), where no model "
                f"was trained to see it; take template: plain. It renders\n{text}"
            )
        if first:
            return [begin] * bool(count or self.begin is not None) + tokens[count:]
        return tokens if text.startswith(mark) else tokens[count:]

    def _cut(self, row: Sequence[tuple[list[int], bool]], length: int, *, asked: bool) -> Feature:
        """One feature of at most `length` tokens; "answer_at" is where the last answer begins."""
        ids = [token for tokens, _ in row for token in tokens]
        everything = self.options.train_on == "all"
        aimed = [learned or everything for tokens, learned in row for _ in tokens]
        answer = 0 if asked else len(row[-1][0])
        question = len(ids) - answer
        if len(ids) > length:
            head = 1 if self.begin is not None and ids[0] == self.begin else 0
            beside = min(question, length // _BESIDE if not asked else length)  # question tokens that are left at least
            kept_answer = min(answer, length - max(beside, head + 1))
            kept_question = min(question, length - kept_answer)
            chosen = [*range(head), *range(question - kept_question + head, question + kept_answer)]
            ids, aimed, question = [ids[i] for i in chosen], [aimed[i] for i in chosen], kept_question
        feature: Feature = {"input_ids": ids, "answer_at": question}
        if not asked:
            labels = [token if aim else IGNORED for token, aim in zip(ids, aimed, strict=True)]
            feature["labels"] = [IGNORED, *labels[1:]]  # nothing stands before the first token to foretell it from
        return feature

    def _pieces(self, examples: Sequence[Example], max_length: int | None, limit: int) -> Encoded:
        plain = {"add_special_tokens": False, "padding": False, "verbose": False}
        whole = self.tokenizer([e.text for e in examples], **plain)["input_ids"]
        begin = [] if self.begin is None else [self.begin]
        texts = []
        for example, tokens in zip(examples, whole, strict=True):
            texts.append([*begin, *tokens, *([self.tokenizer.eos_token_id] if example.label else [])])
        length = min(limit, _PIECE, max(map(len, texts))) if max_length is None else max_length
        features: list[Feature] = []
        for row, (example, ids) in enumerate(zip(examples, texts, strict=True)):
            if not example.label:
                features.append({"input_ids": ids[-length:], "answer_at": min(len(ids), length), "row": row})
                continue
            if len(ids) < 2:
                raise DataError(f"line {example.line}: {example.text[:40]!r} is one token, which nothing stands before")
            for start in range(0, len(ids) - 1, length - 1):
                piece = ids[start : start + length]
                features.append({"input_ids": piece, "labels": [IGNORED, *piece[1:]], "row": row})
        count = len(features)
        return Encoded(features, 0, length, [f"rows are running text: {count} pieces of at most {length} tokens, all of it"])

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Ids, mask and, where the features have them, labels `[rows, tokens]`, padded on the right.

        "answer_at" `[rows]`: where an answer is to be written after so many tokens; -1 where none is asked for.
        """
        width = self.width(features)
        batch = pad_right(features, self.tokenizer.pad_token_id, width)
        if all("labels" in f for f in features):
            batch["labels"] = padded([f["labels"] for f in features], IGNORED, width)
        batch["answer_at"] = torch.tensor([f["answer_at"] if self._asked(f) else -1 for f in features])
        return batch

    def _asked(self, feature: Feature) -> bool:
        return "labels" not in feature or (self.options.generate and feature["row"] < self.options.generate_rows)

    # --- targets and questions

    def aim(self, batch: Mapping[str, torch.Tensor]) -> Aim:
        """The token at a place is foretold at the place before it."""
        labels = batch["labels"]
        rows, places = supervised(labels[:, 1:])
        return Aim(rows, places, labels[rows, places + 1], labels.shape[1])

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the targets, summed; of rows that are padded, or packed into one."""
        if not self.packed:
            return super().loss_sum(model, batch)
        total = torch.zeros((), device=batch["input_ids"].device)
        for row in packed(batch):
            inputs = {key: row[key] for key in ("input_ids", "position_ids")}
            total = total + loss_sum(model, inputs, self.aim(row), label_smoothing=self.label_smoothing)
        return total

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """Ids and mask."""
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    def questions(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """The tokens before each answer that is asked for, padded on the left (T23)."""
        rows = [row for row, place in enumerate(batch["answer_at"].tolist()) if place >= 0]
        if not rows:
            return batch["input_ids"], batch["attention_mask"], []
        asked = [batch["input_ids"][row, : batch["answer_at"][row]] for row in rows]
        limit = self.room(model, 0)
        length = max(limit - min(self.options.max_new_tokens, limit // 2), 2)  # positions that are left to the question
        asked = [torch.cat([ids[:1], ids[1 - length :]]) if len(ids) > length else ids for ids in asked]
        return (*left_padded(asked, self.tokenizer.pad_token_id), rows)

    def room(self, model: Any, width: int) -> int:
        """Positions of the model, less those of virtual tokens."""
        methods = getattr(model, "peft_config", {}).values()
        virtual = max((int(getattr(config, "num_virtual_tokens", None) or 0) for config in methods), default=0)
        return self.limit(model) - virtual - width

    # --- figures

    def text_figures(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """ROUGE and the share that is equal."""
        return overlap_figures(answers, references)


@torch.no_grad()
def _looks_ahead(model: Any) -> bool:
    """Whether what is foretold of a token changes with the one behind it."""
    ids = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 2]])
    first, second = model.eval()(input_ids=ids).logits[:, :3]
    return not torch.equal(first, second)


def _asks(example: Example) -> bool:
    """Whether a conversation waits for its answer; a text alone is a question to a model of conversations."""
    return example.value is None or not example.label
