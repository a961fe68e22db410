"""Conversations as text: which of it the model is given, and which of it it has to say.

A tokenizer's chat template only renders; it does not tell what of the text is an answer, and the mark that could
(`{% generation %}`) is missing from most templates (T21). So it is found out: the conversation is rendered once as it is and
once with a mark in place of every answer. Where putting the answers back in place of the marks gives the same text, the
places of the answers are known for certain; where it does not, that is an error which shows the text.

An answer begins where the template's own invitation to answer ends (`add_generation_prompt`), or, where the template has
none, where its text begins. It ends with the template's end token; where a template has none, the end token of the tokenizer
is added to the last answer, so that every model learns to stop (T20).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from afina.errors import ConfigError, DataError

__all__ = ["TEMPLATES", "Part", "Prompts", "begin_token"]

Message = Mapping[str, str]
Part = tuple[str, bool]  # a stretch of text, and whether it is an answer

_TURNS = """{%% for message in messages %%}
{%% if message["role"] == "assistant" %%}
{{ %(answer)s + message["content"] + eos_token + %(break)s }}
{%% elif message["role"] == "system" %%}
{{ message["content"] + %(break)s }}
{%% else %%}
{{ %(question)s + message["content"] + %(break)s }}
{%% endif %%}
{%% endfor %%}
{%% if add_generation_prompt %%}
{{ %(answer)s }}
{%% endif %%}""".replace("\n", "")
TEMPLATES = {
    "plain": _TURNS % {"question": r'"### Instruction:\n"', "answer": r'"### Response:\n"', "break": r'"\n\n"'},
    "bare": _TURNS % {"question": '""', "answer": '""', "break": r'"\n"'},
}
_MARK = "\ue000{}\ue001"  # letters for private use, which no text of a person holds


def begin_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts in front of every text; None where it puts none."""
    begin = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else None


class Prompts:
    """Renders conversations of a tokenizer that has a chat template.

    `end` is the template's end token as text, None where it has none. Raises ConfigError where the template cannot render a
    question and its answer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        question, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": _MARK.format(0)}
        try:
            asked = self._render([question], ask=True)
            rendered = self._render([question, answer])
            self.invites = asked != self._render([question]) and rendered.startswith(asked)
        except DataError as error:
            raise ConfigError(f"the tokenizer's chat template cannot be used: {error}") from error
        if rendered.count(answer["content"]) != 1:
            raise ConfigError(f"the tokenizer's chat template does not show the answer as it is. It renders\n{rendered}")
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.end = _first(rendered.split(answer["content"])[1], sorted(special | set(tokenizer.all_special_tokens)))

    def question(self, messages: Sequence[Message]) -> str:
        """The text after which the model has to answer; it is that of `parts`, up to the last answer."""
        if self.invites:
            return self._render(messages, ask=True)
        return self._render([*messages, {"role": "assistant", "content": _MARK.format(0)}]).split(_MARK.format(0))[0]

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The conversation up to the end of its last answer, cut where answers begin and end.

        Raises DataError, with the rendered conversation, where answers cannot be told from the rest.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        marks = {i: _MARK.format(i) for i in turns}
        whole = self._render(messages)
        marked = self._render([{**m, "content": marks.get(i, m["content"])} for i, m in enumerate(messages)])
        between, rest = [], marked
        for i in turns:
            if rest.count(marks[i]) != 1:
                raise _unclear(whole, f"it does not show answer {messages[i]['content'][:40]!r} once")
            before, rest = rest.split(marks[i])
            between.append(before)
        after = [*between[1:], rest]
        answers = [messages[i]["content"] for i in turns]
        if whole != "".join(b + a for b, a in zip(between, answers, strict=True)) + rest:
            raise _unclear(whole, "it changes the answers, or what is around them depends on what they say")
        parts: list[Part] = []
        done, place = 0, 0  # characters that are in `parts`, and where the answer's text begins
        for i, before, answer, behind in zip(turns, between, answers, after, strict=True):
            place += len(before)
            start = place
            if self.invites:
                start = len(asked := self._render(messages[:i], ask=True))
                if not whole.startswith(asked) or not done <= start <= place:
                    raise _unclear(whole, f"what asks for {answer[:40]!r} is not what stands before it:\n{asked}")
            place += len(answer)
            said = whole[start:place]
            if self.end is not None and behind.lstrip().startswith(self.end):
                closing = behind[: behind.index(self.end) + len(self.end)]
            else:
                closing = ""
            if start > done or not parts:
                parts.append((whole[done:start], False))
            parts.append((said + closing, True))
            done = place + len(closing)
            if i == turns[-1] and not closing:
                parts[-1] = (said + self.tokenizer.eos_token, True)
        return parts

    def _render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            made = self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=ask)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(f"the chat template refuses messages of {roles}: {error}") from error
        return str(made)


def _first(text: str, tokens: Sequence[str]) -> str | None:
    """The token that comes first in a text, the longest where several begin there."""
    places = [(text.index(token), -len(token), token) for token in tokens if token and token in text]
    return min(places)[2] if places else None


def _unclear(rendered: str, why: str) -> DataError:
    return DataError(
        f"the tokenizer's chat template does not tell answers from the rest: {why}. What is to be learned would be a guess; "
        f"take template: plain. It renders\n{rendered}"
    )
