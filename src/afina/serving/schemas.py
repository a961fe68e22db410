"""What a request may say. A field that would change the answer and is not done is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from afina.errors import did_you_mean
from afina.serving.limits import MAX_CHOICES, MAX_INPUTS, MAX_STOPS
from afina.serving.request_error import RequestError

__all__ = [
    "ChatRequest",
    "ClassifyInput",
    "ClassifyRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "Message",
    "Sampling",
    "StreamOptions",
    "read_request",
]

_SHOWN = 3  # problems of a request that are told at once

# Fields of OpenAI's that are not done, each with the values that mean "not asked for", and why it is refused otherwise.
_NOT_DONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((False, None), "probabilities of tokens are not returned"),
    "top_logprobs": ((None, 0), "probabilities of tokens are not returned"),
    "logit_bias": ((None, {}), "scores of tokens cannot be shifted"),
    "tools": ((None, []), "the model is not told of tools and calls none"),
    "tool_choice": ((None, "none", "auto"), "the model is not told of tools and calls none"),
    "functions": ((None, []), "the model is not told of functions and calls none"),
    "function_call": ((None, "none", "auto"), "the model is not told of functions and calls none"),
    "response_format": ((None, {"type": "text"}), "answers are text; their form is not enforced"),
    "modalities": ((None, ["text"]), "the model reads and writes text alone"),
    "audio": ((None,), "the model reads and writes text alone"),
    "reasoning_effort": ((None,), "the model has no such setting"),
    "prediction": ((None,), "predicted outputs are not done"),
    "web_search_options": ((None,), "the server looks up nothing"),
    "verbosity": ((None,), "the model has no such setting"),
    "best_of": ((None, 1), "each answer is returned; ask for several with n"),
    "suffix": ((None, ""), "text is continued, not filled in"),
    "echo": ((None, False), "the prompt is not returned; put it in front of the answer yourself"),
}  # fmt: skip
# Fields that change no answer.
_WITHOUT_BEARING = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)

Text = Annotated[str, Field(strict=True)]
_Ids = Annotated[list[int], Field(min_length=1)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Request):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(_Request):
    """How tokens are chosen. Nothing said: the likeliest each time, as `afina predict` does."""

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Text | list[Text] | None = Field(None, description=f"a text or a list of at most {MAX_STOPS}, none of them empty")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise ValueError(f"expected at most {MAX_STOPS} stop sequences, none of them empty")
        return value

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class _Part(_Request):
    type: Literal["text"]
    text: Text


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[_Part]  # told as a whole, see `_told`
    name: Text | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None

    @property
    def said(self) -> str:
        """Its content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_INPUTS)] = Field(
        description='a list of {"role": "system", "user" or "assistant", "content": "..."}, with texts alone'
    )
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(Sampling):
    """`/v1/completions`. A prompt is text, or token ids of the model's own tokenizer."""

    prompt: Text | _Ids | Annotated[list[Text] | list[_Ids], Field(min_length=1, max_length=MAX_INPUTS)] = Field(
        description=f"a text, a list of token ids, or a list of either of 1 to {MAX_INPUTS}"
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class EmbeddingRequest(_Request):
    """`/v1/embeddings`. `truncate`: cut texts that are too long, as `afina predict` does."""

    model: Text
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)] = Field(
        description=f"a text or a list of 1 to {MAX_INPUTS} texts (no token ids: every model has its own)"
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    truncate: bool = False


class ClassifyInput(_Request):
    """A text, and a second one where the task reads two; of question answering, the question and its context; of a page, its
    words with a box each, and where those are in pixels its width and height."""

    text: Text | list[Text] | None = None
    boxes: list[list[float]] | None = None
    page_size: list[float] | None = None
    text_pair: Text | None = None
    question: Text | None = None
    context: Text | None = None


class ClassifyRequest(_Request):
    """`/classify`. `truncate`: cut texts that are too long, as `afina predict` does."""

    model: Text
    input: Text | ClassifyInput | Annotated[list[Text | ClassifyInput], Field(min_length=1, max_length=MAX_INPUTS)] = Field(
        description='a text, {"text": ..., "text_pair": ...}, {"question": ..., "context": ...}, or a list of '
        f"1 to {MAX_INPUTS} of these"
    )
    truncate: bool = False


def read_request(body: bytes, schema: type[Any]) -> Any:
    """A request's body as `schema`. Raises RequestError (400) with what is wrong in it."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_not_json)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError(400, f"the body is a JSON {_kind(content)}; expected an object with the field model and others")
    content = {key: value for key, value in content.items() if key not in _WITHOUT_BEARING}
    known = set(schema.model_fields)
    for key, (idle, why) in _NOT_DONE.items():
        if key in content and key not in known:
            if not any(type(content[key]) is type(value) and content[key] == value for value in idle):
                said = f"{key}={_short(content[key])} is not done: {why}. Leave it out"
                raise RequestError(400, said, param=key, code="unsupported")
            del content[key]
    for key in sorted(set(content) - known):
        near = did_you_mean(key, known)
        raise RequestError(400, f"{key!r} is no field of this request.{near}", param=key, code="unknown_field")
    if not _is_text(content):
        raise RequestError(400, "a text holds half of a surrogate pair (\\ud800 to \\udfff alone), which is no letter")
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        found = error.errors()
        told = list(dict.fromkeys(_told(one, found, schema) for one in found))
        first = found[0]["loc"]
        more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        raise RequestError(400, "; ".join(told[:_SHOWN]) + more, param=str(first[0]) if first else None) from None


def _not_json(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _kind(value: Any) -> str:
    kinds = {list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) < 60 else f"{text[:60]}…"


def _is_text(value: Any) -> bool:
    """Whether all texts of a JSON value can be written as UTF-8."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            try:
                one.encode("utf-8")
            except UnicodeEncodeError:
                return False
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
    return True


def _told(error: Any, errors: Sequence[Any], schema: Any) -> str:
    """One problem: the field as a path, what was found, what is expected."""
    described = schema.model_fields[error["loc"][0]].description if error["loc"][0] in schema.model_fields else None
    if described is not None:  # of several forms: what each of them lacks would tell nothing
        paths = [one["loc"][1:] for one in errors if one["loc"][0] == error["loc"][0]]
        where = next((f"[{step}]" for path in paths for step in path if isinstance(step, int)), "")
        return f"{error['loc'][0]}{where}: expected {described}"
    path = ""
    for step in error["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step}" if path else step
    if error["type"] == "missing":
        return f"{path} is missing"
    if error["type"] == "extra_forbidden":
        return f"{path} is no field of this request"
    found = f"{_short(error['input'])}: " if not isinstance(error["input"], dict | list) else ""
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{path}={found}{said}" if found else f"{path}: {said}"
