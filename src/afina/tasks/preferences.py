"""Rows that say which answer is better: a prompt with two answers, or with one and a judgement of it.

A prompt is a text or messages; an answer is a text, a message, or the whole conversation that begins with the prompt. Rows
with an empty or missing answer, and pairs whose answers are the same, are dropped and told; pairs of one prompt, or of
nearly the same, are on one side of the split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from afina.data.clean import normalised
from afina.data.example import Column, Example, Kind, UnusableError
from afina.tasks.conversations import messages_in

__all__ = ["BAD", "GOOD", "JUDGED", "PAIRS", "PROMPTS", "Asked", "scored_pairs"]

GOOD, BAD = "desirable", "undesirable"
_PROMPTS = ("prompt", "instruction", "question", "query", "messages", "conversations", "text")
_YES = {"true", "1", "1.0", "yes", "y", "good", "up", "+1", "desirable", "chosen", "positive", "like", "👍"}
_NO = {"false", "0", "0.0", "no", "n", "bad", "down", "-1", "undesirable", "rejected", "negative", "dislike", "👎"}


@dataclass(frozen=True)
class Asked:
    """A prompt as messages, and answers to it: of a pair the better one first."""

    messages: tuple[Mapping[str, str], ...]
    answers: tuple[str, ...] = ()
    label: str = ""

    @property
    def prompt(self) -> str:
        """The prompt as one text."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


def make_pair(row: Mapping[str, str], line: int | str) -> Example:
    """A prompt, the better answer and the worse one; with the worse one left out, a prompt that asks."""
    messages = _prompt(row["text"])
    better = _answer(row["text_pair"], messages, "chosen") if row.get("text_pair") else ""
    if "label" not in row:
        return _example(messages, (better,) if better else (), "", line)
    worse = _answer(row["label"], messages, "rejected")
    if not better.strip() or not worse.strip():
        raise UnusableError(f"the {'better' if not better.strip() else 'worse'} answer is empty")
    if better.strip() == worse.strip():
        raise UnusableError("both answers are the same, so that neither is better")
    return _example(messages, (better, worse), f"{better}\n{worse}", line)


def make_judged(row: Mapping[str, str], line: int | str) -> Example:
    """A prompt, an answer, and whether it is a good one; without that, a prompt that asks."""
    messages = _prompt(row["text"])
    if "label" not in row:
        return _example(messages, (), "", line)
    answer = _answer(row.get("text_pair", ""), messages, "the answer")
    said = row["label"].strip().lower()
    if said not in _YES | _NO:
        raise ValueError(f"{row['label'][:40]!r} is no judgement; expected true or false (also 1 or 0, good or bad)")
    if not answer.strip():
        raise UnusableError("the answer is empty")
    made = _example(messages, (answer,), GOOD if said in _YES else BAD, line)
    return Example(f"{made.text}\n{answer}", made.label, line, made.value, group=normalised(made.text))


def make_prompt(row: Mapping[str, str], line: int | str) -> Example:
    """A prompt, and what else a reward function is told of it."""
    asked = Asked(_prompt(row["text"]), (), row.get("label", ""))
    return Example(asked.prompt, asked.label or "-", line, asked)


def _example(messages: tuple[Mapping[str, str], ...], answers: tuple[str, ...], label: str, line: int | str) -> Example:
    asked = Asked(messages, answers)
    return Example(asked.prompt, label, line, asked)


def _prompt(text: str) -> tuple[Mapping[str, str], ...]:
    messages = messages_in(text)
    if messages is None:
        return ({"role": "user", "content": text},)
    if messages[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with an answer; expected a question last")
    return tuple(messages)


def _answer(text: str, prompt: Sequence[Mapping[str, str]], what: str) -> str:
    """An answer out of a text, a message, or the conversation that it ends; "" where that answer has no words."""
    if text.lstrip().startswith(("{", "[")):
        with suppress(ValueError, TypeError, KeyError, IndexError):
            content = json.loads(text)
            content = [content] if isinstance(content, dict) else content
            if not content[-1]["content"].strip():
                return ""
            text = json.dumps(content) if {"role", "from"} & content[-1].keys() else text
    messages = messages_in(text)
    if messages is None:
        return text
    before, last = messages[:-1], messages[-1]
    if last["role"] != "assistant":
        raise ValueError(f"{what} ends with a message of {last['role']}; expected an answer of the assistant last")
    if before and [(m["role"], m["content"]) for m in before] != [(m["role"], m["content"]) for m in prompt]:
        raise ValueError(
            f"{what} holds {len(messages)} messages that do not begin with the prompt; expected the prompt's messages and "
            "one answer, or the answer alone"
        )
    return last["content"]


def scored_pairs(examples: Sequence[Example]) -> list[tuple[str, str]]:
    """The better and the worse answer of each example."""
    return [(e.value.answers[0], e.value.answers[1]) for e in examples]


_PROMPT = Column("the prompt: a text, or messages", _PROMPTS, structured=True)
PAIRS = Kind(
    columns={
        "text": _PROMPT,
        "text_pair": Column(
            "the better answer; when a ranker is asked, the answer",
            ("chosen", "preferred", "accepted", "better"),
            structured=True,
        ),
        "label": Column("the worse answer", ("rejected", "dispreferred", "worse"), structured=True),
    },
    labels="text",
    make=make_pair,
)
JUDGED = Kind(
    columns={
        "text": _PROMPT,
        "text_pair": Column("the answer", ("completion", "answer", "response", "output"), structured=True, asked=False),
        "label": Column("whether it is good: true or false", ("label", "desirable", "thumbs", "rating", "good")),
    },
    labels="class",
    make=make_judged,
)
PROMPTS = Kind(
    columns={
        "text": _PROMPT,
        "label": Column("what a reward function is told of the prompt", ("answer", "solution", "label"), required=False),
    },
    labels="none",
    make=make_prompt,
)
