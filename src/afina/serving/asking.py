"""From a request to work for the engine: texts become features or tokens, and what is too long or empty is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from afina.data.example import Example
from afina.errors import AfinaError
from afina.serving.chat import chat_tokens, conversation
from afina.serving.engine import Reading
from afina.serving.limits import Limits
from afina.serving.models import Served
from afina.serving.request_error import RequestError
from afina.serving.sampling import Choosing
from afina.serving.schemas import ChatRequest, ClassifyInput, ClassifyRequest, CompletionRequest, EmbeddingRequest, Sampling
from afina.serving.text import TextStream
from afina.serving.writing import Writing
from afina.tasks.causal_lm import CausalLM
from afina.tasks.sentence_similarity import SentenceSimilarity
from afina.tasks.task import NO_LIMIT, Rows
from afina.tasks.writing import WritingTask

__all__ = ["Texts", "chat_prompt", "completion_prompts", "texts_of_classify", "texts_of_embeddings", "writings"]

_SIMILARITY = "FEATURE_EXTRACTION"


@dataclass
class Texts:
    """Texts to be read, and the parts in which the engine reads them."""

    served: Served
    rows: Rows
    parts: list[Reading]
    truncated: int

    @property
    def tokens(self) -> int:
        """Tokens of all texts, as they are read."""
        return sum(self.rows.lengths)

    async def answers(self) -> list[Any]:
        """One answer a text."""
        made = await asyncio.gather(*(asyncio.wrap_future(part.answers) for part in self.parts))
        return self.served.task.join([answer for part in made for answer in part], self.rows)


# --- texts that are read


def texts_of_classify(served: Served, asked: ClassifyRequest, limits: Limits) -> Texts:
    """Raises RequestError where the model does not classify, or a text cannot be read."""
    task = served.task
    if isinstance(task, WritingTask):
        other = "/v1/chat/completions or /v1/completions" if isinstance(task, CausalLM) else "/v1/completions"
        raise RequestError(400, f"{served.name} writes text ({task.name}); ask {other}", param="model")
    given = asked.input if isinstance(asked.input, list) else [asked.input]
    rows = [_row(served, one, number) for number, one in enumerate(given)]
    if task.task_type == _SIMILARITY and not all("text_pair" in row for row in rows):
        raise RequestError(
            400, f"{served.name} compares two texts; give text and text_pair, or ask /v1/embeddings for the vector of one",
            param="input",
        )  # fmt: skip
    return _texts(served, rows, limits, truncate=asked.truncate)


def texts_of_embeddings(served: Served, asked: EmbeddingRequest, limits: Limits) -> Texts:
    """Raises RequestError where the model makes no vectors, or a text cannot be read."""
    if not isinstance(served.task, SentenceSimilarity):
        where = "/v1/completions" if served.lane.writes else "/classify"
        raise RequestError(400, f"{served.name} ({served.task.name}) makes no vectors; ask {where}", param="model")
    width = served.lane.model.config.hidden_size
    if asked.dimensions not in (None, width):
        said = f"dimensions={asked.dimensions}: vectors of {served.name} have {width} and are not cut"
        raise RequestError(400, said, param="dimensions")
    given = [asked.input] if isinstance(asked.input, str) else asked.input
    return _texts(served, [{"text": text} for text in given], limits, truncate=asked.truncate)


def _row(served: Served, given: Any, number: int) -> dict[str, str]:
    """One input by role."""
    one = ClassifyInput(text=given) if isinstance(given, str) else given
    where = f"input[{number}]"
    if (one.question is None) != (one.context is None) or (one.question is not None and one.text is not None):
        raise RequestError(400, f"{where}: question and context go together, without text", param="input")
    text = one.text if one.question is None else one.question
    pair = one.text_pair if one.context is None else one.context
    columns = served.task.kind.columns
    if text is None:
        raise RequestError(400, f"{where}.text is missing", param="input")
    if isinstance(text, list):
        if not columns["text"].structured:
            raise RequestError(400, f"{where}.text is a list; {served.task.name} reads a text", param="input")
        text = json.dumps(text, ensure_ascii=False)
    row = {"text": text}
    for role, values in (("boxes", one.boxes), ("page_size", one.page_size)):
        if values is not None and role not in columns:
            raise RequestError(400, f"{where}.{role}: {served.task.name} reads none", param="input")
        if values is not None:
            row[role] = json.dumps(values)
    trained = served.run.columns
    if pair is not None:
        if "text_pair" not in columns:
            raise RequestError(400, f"{where}.text_pair: {served.task.name} reads one text, not two", param="input")
        if "text_pair" not in trained and served.tuned:
            said = f"{served.name} was trained on single texts and never saw a second one"
            raise RequestError(400, f"{where}.text_pair: {said}", param="input")
        row["text_pair"] = pair
    elif columns.get("text_pair") and "text_pair" in trained and served.task.task_type != _SIMILARITY:
        raise RequestError(400, f"{where}.text_pair is missing: {columns['text_pair'].help}", param="input")
    return row


def _texts(served: Served, rows: Sequence[dict[str, str]], limits: Limits, *, truncate: bool) -> Texts:
    task, run = served.task, served.run
    for number, row in enumerate(rows):
        if empty := [role for role, text in row.items() if not text.strip()]:
            raise RequestError(400, f"input[{number}].{empty[0]} is empty", param="input")
    length = task.asked_length(run.recipe.training.max_length or served.lane.limit, served.lane.limit)
    if not served.tuned:
        length = min(served.lane.limit, task.tokenizer.model_max_length or NO_LIMIT)
    with served.lock:
        try:
            examples = run.asked(rows, [f"input[{number}]" for number in range(len(rows))])
            if empty_now := [e.line for e in examples if not e.text.strip()]:
                raise RequestError(400, f"{empty_now[0]} is empty", param="input")
            encoded = task.encode(examples, length, served.lane.limit)
        except AfinaError as error:
            raise RequestError(400, str(error).removeprefix("the rows: "), param="input") from None
    if encoded.truncated and not truncate:
        which = "the text is" if len(rows) == 1 else f"{encoded.truncated} of {len(rows)} texts are"
        raise RequestError(
            400, f'{which} longer than the {length} tokens of training could be; shorten, or say "truncate": true to have '
            "the end cut off", param="input", code="context_length_exceeded",
        )  # fmt: skip
    features = list(encoded.features)
    parts, chosen, size = list[Reading](), list[Any](), 0
    for feature in features:
        more = 1 + ("pair_ids" in feature)
        if chosen and size + more > limits.max_batch:
            parts.append(Reading(served, chosen))
            chosen, size = [], 0
        chosen.append(feature)
        size += more
    parts.append(Reading(served, chosen))
    return Texts(served, Rows(list(examples), features), parts, encoded.truncated)


# --- texts that are written


def chat_prompt(served: Served, asked: ChatRequest) -> list[int]:
    """Token ids of a conversation."""
    with served.lock:
        return chat_tokens(served, conversation(served, asked.messages))


def completion_prompts(served: Served, asked: CompletionRequest) -> list[list[int]]:
    """Token ids of prompts that are continued, or read by an encoder. Raises RequestError for what cannot be."""
    task: Any = served.task
    if not isinstance(task, WritingTask):
        other = "/v1/embeddings" if task.task_type == _SIMILARITY else "/classify"
        raise RequestError(400, f"{served.name} ({task.name}) writes no text; ask {other}", param="model")
    size = len(task.tokenizer)
    made = []
    for number, prompt in enumerate(asked.prompts):
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError(400, f"prompt {number} is empty", param="prompt")
            with served.lock:
                made.append(_prompt_tokens(served, prompt))
            continue
        if not prompt or not all(0 <= token < size for token in prompt):
            said = f"prompt {number}: expected token ids from 0 to {size - 1}, at least one"
            raise RequestError(400, said, param="prompt")
        if not isinstance(task, CausalLM):
            raise RequestError(400, f"prompt {number}: {served.name} reads text, not token ids", param="prompt")
        made.append(list(prompt))
    return made


def _prompt_tokens(served: Served, prompt: str) -> list[int]:
    """A prompt as the run's rows had it: of text that goes on, the text itself; of sources, the source with its prefix."""
    task: Any = served.task
    if isinstance(task, CausalLM):
        begin = [] if task.begin is None else [task.begin]
        ids = list(task.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        return [*begin, *(ids[1:] if begin and ids[:1] == begin else ids)]
    try:
        rows = [{"text": prompt}]
        examples = served.run.asked(rows) if served.tuned else [Example(prompt, "", 1)]
        return list(task.encode(examples, NO_LIMIT, NO_LIMIT).features[0]["input_ids"])
    except AfinaError as error:
        raise RequestError(400, str(error), param="prompt") from None


def writings(
    served: Served, prompts: Sequence[list[int]], asked: Sampling, most: int | None,
    tell: Callable[[int], Callable[[str, str | None], None]], fail: Callable[[BaseException], None],
) -> list[Writing]:  # fmt: skip
    """`n` texts for each prompt. Raises RequestError for prompts that are too long and for choices that cannot be made.

    `tell(index)` makes what hears of the text of one choice.
    """
    task: Any = served.task
    stripped = isinstance(asked, ChatRequest) or not isinstance(task, CausalLM)
    how = Choosing(
        asked.temperature or 0.0, asked.top_p or 1.0, asked.top_k, asked.seed, asked.presence_penalty or 0.0,
        asked.frequency_penalty or 0.0,
    )  # fmt: skip
    if served.whole and (how.temperature or how.presence_penalty or how.frequency_penalty):
        raise RequestError(400, f"{served.name} takes no temperature and no penalties: {served.whole}", param="temperature")
    ends = frozenset(task.ends(served.lane.model.get_base_model()))
    spelled = _spelled(task.tokenizer)
    decode = lambda ids: task.tokenizer.decode(ids, skip_special_tokens=True)
    made = []
    for number, prompt in enumerate(prompts):
        room = _room(served, prompt)
        if room < 1 or (most is not None and most > room and isinstance(task, CausalLM)):
            wanted = f" and {most} are asked for" if most is not None else ""
            raise RequestError(
                400, f"the prompt has {len(prompt)} tokens{wanted}; {served.name} takes {_limit(served)} in all",
                param="messages" if isinstance(asked, ChatRequest) else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        for choice in range(asked.n or 1):
            index = number * (asked.n or 1) + choice
            own = how if how.seed is None or not choice else replace(how, seed=(how.seed + choice) % 2**63)
            made.append(
                Writing(
                    served,
                    prompt,
                    min(most or task.options.max_new_tokens, room),
                    own,
                    TextStream(decode, asked.stops, spelled=spelled, stripped=stripped),
                    ends,
                    tell(index),
                    bool(asked.stream),
                    fail=fail,
                )
            )
    return made


def _spelled(tokenizer: Any) -> frozenset[int]:
    """Tokens that stand for one byte of a letter without a token, where the tokenizer has such; control tokens, which are
    left out of the text, do not part them."""
    found = (tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256))
    ids = {i for i in found if i is not None and i != tokenizer.unk_token_id}
    return frozenset(ids | set(tokenizer.all_special_ids) if ids else ())


def _limit(served: Served) -> int:
    """Tokens of prompt and answer; of an encoder, of the prompt alone."""
    virtual = 0
    if served.tuned:
        virtual = int(getattr(served.lane.model.peft_config[served.adapter], "num_virtual_tokens", None) or 0)
    return served.lane.limit - virtual


def _room(served: Served, prompt: Sequence[int]) -> int:
    """Tokens that can be written behind a prompt; less than 1 where it is too long."""
    if isinstance(served.task, CausalLM):
        return _limit(served) - len(prompt)
    return _limit(served) - 1 if len(prompt) <= _limit(served) else 0
