"""Rows as conversations: a list of messages, a question and its answer, or a text alone.

    messages            [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]
    instruction, (input), output        a message of the user, one of the assistant
    prompt, completion                  the same
    text                                no conversation: the text itself is what is learned

A row of the first form is known by its content, the others by the columns that are there. A column of JSON with `from` and
`value` (ShareGPT) is read as messages too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.data.example import Column, Example, Kind
from afina.data.table import Table, decoded
from afina.errors import DataError

__all__ = ["CONVERSATIONS", "messages_in", "question_of"]

_TEXTS = ("text", "content", "document", "passage", "body")  # columns that need no answer
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_RUNNING = (".txt", ".text", ".md")


def make(row: Mapping[str, str], line: int | str) -> Example:
    """See the module. `value` is the messages; None for a text alone, whose label is itself."""
    messages = messages_in(row["text"])
    if messages is not None:
        answered = messages[-1]["role"] == "assistant"
        asked = messages[:-1] if answered else messages
        if answered and not asked:
            raise ValueError("the conversation begins with its last answer; expected a question before it")
        text = "\n".join(m["content"] for m in asked)
        return Example(text, messages[-1]["content"] if answered else "", line, messages)
    asked_text = "\n\n".join(part for part in (row["text"], row.get("text_pair", "")) if part)
    question = [{"role": "user", "content": asked_text}]
    if row.get("label"):
        return Example(asked_text, row["label"], line, [*question, {"role": "assistant", "content": row["label"]}])
    return Example(asked_text, asked_text, line)


def question_of(example: Example) -> list[dict[str, str]]:
    """The messages up to the last answer."""
    messages = example.value or [{"role": "user", "content": example.text}]
    return list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def messages_in(text: str) -> list[dict[str, str]] | None:
    """The messages that a text holds as JSON; None where it holds something else. Raises ValueError where one is broken."""
    if not text.startswith("["):
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, list) or not content:
        return None
    if not all(isinstance(message, dict) and message.keys() & {"role", "from"} for message in content):
        return None
    messages = []
    for number, message in enumerate(content, 1):
        role, said = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(said, str):
            found = json.dumps(message, ensure_ascii=False)[:60]
            raise ValueError(f'message {number} is {found}; expected {{"role": "user" or "assistant", "content": "..."}}')
        if role in ("assistant", "gpt") and not said.strip():
            raise ValueError(f"message {number} is an answer of no words, which would teach the model to say nothing")
        messages.append({"role": _ROLES.get(role, role), "content": said.strip()})
    return messages


def check_columns(columns: Mapping[str, str]) -> str | None:
    """A column of questions without one of answers would be learned as if the questions were what to say."""
    name = columns.get("text", "")
    if "label" in columns or name in ("messages", "conversations", "conversation") or name in _TEXTS:
        return None
    if name in ("instruction", "prompt", "question", "query") or "text_pair" in columns:
        return f"column {name!r} asks, and no column answers"
    return None


def read_text(path: Path) -> Any:
    """A file of running text (.txt, .md) as one row, to be divided where it stands; None for other forms."""
    if path.suffix.lower() not in _RUNNING or not path.is_file():
        return None
    text, encoding, notes = decoded(path)
    if not text.strip():
        raise DataError(f"{path} is empty")
    return Table(path, ["text"], [{"text": text}], [1], "", encoding, notes, text="text", running=True)


CONVERSATIONS = Kind(
    columns={
        "text": Column(
            "the question, the messages, or the text alone",
            ("messages", "conversations", "instruction", "prompt", "question", "query", *_TEXTS),
            structured=True,
        ),
        "text_pair": Column("what the instruction is about", ("input", "context"), required=False),
        "label": Column("the answer", ("output", "completion", "response", "answer"), required=False),
    },
    labels="text",
    make=make,
    read=read_text,
    check=check_columns,
)
