"""The paths of the server and the form of their answers, which is OpenAI's where OpenAI has one."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from afina import __version__
from afina.serving.asking import (
    Texts,
    chat_prompt,
    completion_prompts,
    texts_of_classify,
    texts_of_embeddings,
    writings,
)  # fmt: skip
from afina.serving.door import Door, internal, read_body, respond
from afina.serving.engine import Engine
from afina.serving.limits import Limits
from afina.serving.metrics import Metrics
from afina.serving.models import Models, Served, find_served
from afina.serving.request_error import RequestError
from afina.serving.schemas import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest, read_request

__all__ = ["make_app"]

logger = logging.getLogger("afina.serving")
_END = b"data: [DONE]\n\n"


def make_app(models: Models, limits: Limits) -> Door:
    """An ASGI app that answers with `models`. Its engine runs from startup to shutdown."""
    engine = Engine(models, limits)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, engine.close)
        reader.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="afina", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    reader = ThreadPoolExecutor(1, "afina-reader")  # long texts are tokenised beside the loop, one after the other
    paths = frozenset({
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/classify", "/v1/models", "/health", "/metrics",
        "/openapi.json",
    })  # fmt: skip
    door = Door(app, limits, paths)
    metrics = door.metrics = Metrics(lambda: engine.waiting, lambda: door.inside)
    engine.seen = metrics.batch

    async def opened(request: Request, schema: type[Any], deadline: float) -> tuple[Any, Served]:
        try:
            async with asyncio.timeout_at(deadline):
                body = await read_body(request.scope, request.receive, limits.max_body)
        except TimeoutError:
            raise RequestError(408, f"the request was not there after {limits.timeout:g} seconds (--timeout)") from None
        asked = read_request(body, schema)
        served = find_served(models, asked.model)
        request.scope["afina"]["model"] = served.name
        return asked, served

    async def prepared(make: Callable[[], Any], deadline: float) -> Any:
        """Tokenised, in the thread for that."""
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(reader, make)
        except TimeoutError:
            raise _late(limits) from None

    def clock() -> float:
        return asyncio.get_running_loop().time() + limits.timeout

    async def computed(request: Request, works: Sequence[Any], result: Any, deadline: float) -> Any:
        """The result of submitted works; they are dropped where the client goes away or time is up."""
        engine.submit(works)
        waiting, gone = asyncio.ensure_future(result), asyncio.ensure_future(_gone(request.receive))
        try:
            left = deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait({waiting, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if waiting in done:
                return waiting.result()
            if gone in done:
                raise RequestError(499, "the client went away")
            raise _late(limits)
        except RequestError:
            raise
        except Exception as error:
            logger.exception("request %s failed", request.scope["afina"]["id"], exc_info=error)
            raise RequestError(500, internal(request.scope["afina"]["id"], error), code="internal_error") from None
        finally:
            for work in works:
                work.cancelled = True
            waiting.cancel()
            gone.cancel()

    # --- texts that are read

    async def read(request: Request, schema: type[Any], make: Callable[..., Texts], shape: Callable[..., Any]) -> Any:
        deadline = clock()
        asked, served = await opened(request, schema, deadline)
        texts: Texts = await prepared(lambda: make(served, asked, limits), deadline)
        answers = await computed(request, texts.parts, texts.answers(), deadline)
        metrics.tokens.labels(served.name, "prompt").inc(texts.tokens)
        return JSONResponse(shape(asked, served, texts, answers))

    @app.post("/v1/embeddings", openapi_extra=_documented(EmbeddingRequest))
    async def embeddings(request: Request) -> Any:
        """Vectors of texts."""
        return await read(request, EmbeddingRequest, texts_of_embeddings, _vectors)

    @app.post("/classify", openapi_extra=_documented(ClassifyRequest))
    async def classify(request: Request) -> Any:
        """Classes, numbers, tags or spans of texts."""
        return await read(request, ClassifyRequest, texts_of_classify, _classified)

    # --- texts that are written

    async def write(request: Request, schema: type[Any], chat: bool) -> Any:
        deadline = clock()
        asked, served = await opened(request, schema, deadline)
        if asked.stream_options is not None and not asked.stream:
            raise RequestError(400, "stream_options goes with stream: true", param="stream_options")
        if chat:
            prompts = [await prepared(lambda: chat_prompt(served, asked), deadline)]
            most = asked.max_completion_tokens if asked.max_tokens is None else asked.max_tokens
            if None not in (asked.max_completion_tokens, asked.max_tokens):
                raise RequestError(400, "max_tokens and max_completion_tokens mean the same; give one", param="max_tokens")
        else:
            prompts, most = await prepared(lambda: completion_prompts(served, asked), deadline), asked.max_tokens
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def put(event: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        tell = lambda index: lambda piece, reason: put((index, piece, reason))
        works = writings(served, prompts, asked, most, tell, put)
        form = _Form(chat, served.name)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            engine.submit(works)
            return _Stream(form, works, events, deadline, usage, limits, metrics)
        texts, reasons = [""] * len(works), list[Any]([None] * len(works))

        async def result() -> None:
            while None in reasons:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                texts[event[0]], reasons[event[0]] = event[1], event[2]

        await computed(request, works, result(), deadline)
        used = _usage(prompts, works)
        _count(metrics, served, used)
        choices = [form.choice(i, text, reason) for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))]
        return JSONResponse({**form.head(), "choices": choices, "usage": used})

    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatRequest))
    async def chat_completions(request: Request) -> Any:
        """The next turn of a conversation."""
        return await write(request, ChatRequest, chat=True)

    @app.post("/v1/completions", openapi_extra=_documented(CompletionRequest))
    async def completions(request: Request) -> Any:
        """Text that goes on from a prompt, or that follows from a source."""
        return await write(request, CompletionRequest, chat=False)

    # --- about the server

    @app.get("/v1/models")
    async def list_models() -> Any:
        """What can be asked."""
        return {"object": "list", "data": [_described(served) for served in models.by_name.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Any:
        """One of them."""
        return _described(find_served(models, name))

    @app.get("/health")
    async def health() -> Any:
        """200 while requests are answered."""
        return JSONResponse({"status": "ok" if engine.alive else "stopping"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def exposition() -> Any:
        """For Prometheus."""
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def refused(request: Request, error: Any) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    async def not_there(request: Request, error: Any) -> Response:
        what = f"{request.method} {request.url.path[:200]}"
        known = "; ".join(sorted(paths - {"/openapi.json"}))
        said = f"{what}: there is no such path. There are {known}" if error.status_code == 404 else f"{what}: {error.detail}"
        return JSONResponse(RequestError(error.status_code, said).body(), error.status_code, error.headers)

    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(HTTPException, not_there)
    return door


def _late(limits: Limits) -> RequestError:
    said = f"no answer within {limits.timeout:g} seconds (--timeout); the work was dropped"
    return RequestError(504, said, code="timeout")


def _documented(schema: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": schema.model_json_schema(ref_template="#/$defs/{model}")}}
    return {"requestBody": {"required": True, "content": content}}


# --- the form of answers


def _described(served: Served) -> dict[str, Any]:
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "afina", "task": served.task.name,
        "base": served.lane.source.name, "adapter": served.tuned, "max_length": served.lane.limit,
    }  # fmt: skip


def _classified(asked: ClassifyRequest, served: Served, texts: Texts, answers: Sequence[Any]) -> dict[str, Any]:
    made = []
    for i, (answer, example) in enumerate(zip(answers, texts.rows.examples, strict=True)):
        made.append({"index": i, **served.task.respond(answer, example)})
    if not _finite(made):
        raise _no_number(served)
    return {
        "object": "list", "model": served.name, "task": served.task.name, "data": made, "truncated": texts.truncated,
        "usage": {"prompt_tokens": texts.tokens, "total_tokens": texts.tokens},
    }  # fmt: skip


def _vectors(asked: EmbeddingRequest, served: Served, texts: Texts, answers: Sequence[Any]) -> dict[str, Any]:
    data = []
    for i, answer in enumerate(answers):
        vector = answer[0].astype("<f4")
        if not math.isfinite(float(vector.sum())):
            raise _no_number(served)
        coded: Any = [float(x) for x in vector]
        if asked.encoding_format == "base64":
            coded = base64.b64encode(vector.tobytes()).decode()
        data.append({"object": "embedding", "index": i, "embedding": coded})
    return {
        "object": "list", "model": served.name, "data": data,
        "usage": {"prompt_tokens": texts.tokens, "total_tokens": texts.tokens},
    }  # fmt: skip


def _no_number(served: Served) -> RequestError:
    said = f"{served.name} answers with what is no number; its weights may be broken"
    return RequestError(500, said, code="internal_error")


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _usage(prompts: Sequence[Sequence[int]], works: Sequence[Any]) -> dict[str, int]:
    read, written = sum(map(len, prompts)), sum(len(work.written) for work in works)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _count(metrics: Metrics, served: Served, used: dict[str, int]) -> None:
    metrics.tokens.labels(served.name, "prompt").inc(used["prompt_tokens"])
    metrics.tokens.labels(served.name, "completion").inc(used["completion_tokens"])


class _Form:
    """An answer of one of the two paths that write, whole or in pieces."""

    def __init__(self, chat: bool, name: str):
        self.chat = chat
        self.id, self.name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", name
        self.created = int(time.time())

    def head(self, *, piece: bool = False) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if piece else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def piece(self, index: int, text: str, reason: str | None, *, first: bool = False) -> dict[str, Any]:
        if not self.chat:
            return self.choice(index, text, reason)
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class _Stream(Response):
    """A streamed answer, as an ASGI response: pieces as they come, then what was used, then [DONE]."""

    def __init__(
        self, form: _Form, works: Sequence[Any], events: Any, deadline: float, usage: bool, limits: Limits, metrics: Metrics
    ):
        super().__init__()
        self.form, self.works, self.events, self.deadline = form, works, events, deadline
        self.usage, self.limits, self.metrics = usage, limits, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone = asyncio.ensure_future(_gone(receive))
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        try:
            first = await self._next(gone)
            if first is None:
                return
            if isinstance(first, BaseException):
                told = self._told(first, scope)
                await respond(send, told.status, told.body(), told.headers)
                return
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._pieces(first, gone, scope, send)
        finally:
            gone.cancel()
            for work in self.works:
                work.cancelled = True

    async def _pieces(self, event: Any, gone: Any, scope: Any, send: Any) -> None:
        if self.form.chat:
            for index in range(len(self.works)):
                await self._send(send, [self.form.piece(index, "", None, first=True)])
        left = len(self.works)
        while True:
            if event is None:  # the client went away
                return
            if isinstance(event, BaseException):
                await self._data(send, self._told(event, scope).body())
                break
            index, text, reason = event
            if text or (reason and not self.form.chat):
                await self._send(send, [self.form.piece(index, text, None if self.form.chat else reason)])
            if reason and self.form.chat:
                await self._send(send, [self.form.piece(index, "", reason)])
            left -= reason is not None
            if not left:
                used = _usage([w.prompt for w in self.works[:: max(1, self._copies())]], self.works)
                _count(self.metrics, self.works[0].served, used)
                if self.usage:
                    await self._data(send, {**self.form.head(piece=True), "choices": [], "usage": used})
                break
            event = await self._next(gone)
        await send({"type": "http.response.body", "body": _END, "more_body": False})

    def _copies(self) -> int:
        """Choices of one prompt, which share its list of tokens."""
        return sum(work.prompt is self.works[0].prompt for work in self.works)

    async def _next(self, gone: Any) -> Any:
        """The next event; None where the client went away, RequestError where time is up."""
        got = asyncio.ensure_future(self.events.get())
        try:
            left = self.deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait({got, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if got in done:
                return got.result()
            return None if gone in done else _late(self.limits)
        finally:
            got.cancel()

    def _told(self, error: BaseException, scope: Any) -> RequestError:
        if isinstance(error, RequestError):
            return error
        logger.error("request %s failed", scope["afina"]["id"], exc_info=error)
        return RequestError(500, internal(scope["afina"]["id"], error), code="internal_error")

    async def _send(self, send: Any, choices: list[Any]) -> None:
        extra = {"usage": None} if self.usage else {}
        await self._data(send, {**self.form.head(piece=True), "choices": choices, **extra})

    async def _data(self, send: Any, content: Any) -> None:
        body = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
