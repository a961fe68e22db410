"""Everything that holds for all requests: the key, how many are inside, what an unforeseen error says, what is counted.

It is a plain ASGI layer, so that a request counts as inside until the last piece of a streamed answer is sent.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from afina.serving.limits import Limits
from afina.serving.request_error import RequestError

__all__ = ["Door", "read_body"]

logger = logging.getLogger("afina.serving")
_GRACE = 5.0  # seconds after the time limit in which the answer must have been taken
_OPEN = frozenset({"/health"})  # asked by what starts and stops servers, which has no key

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]


class Door:
    """Wraps an ASGI app. `metrics` is set by who makes it; a handler leaves the model's name in `scope["afina"]`."""

    def __init__(self, app: Any, limits: Limits, paths: frozenset[str]):
        self.app, self.limits, self.paths = app, limits, paths
        self.inside = 0
        self.metrics: Any = None
        self.rate = 0.0  # requests a second, of late
        self._last = time.monotonic()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, path = time.monotonic(), 0, scope["path"]
        scope["afina"] = {"model": "", "id": f"req_{uuid.uuid4().hex[:16]}"}

        async def sent(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", scope["afina"]["id"].encode())]
            await send(message)

        posted = scope["method"] == "POST"
        self.inside += posted
        try:
            self._check_key(scope)
            if posted and self.inside > self.limits.queue:
                raise RequestError(
                    429, f"{self.limits.queue} requests are inside already (--queue); try again later",
                    headers={"retry-after": str(self._wait())}, code="queue_full",
                )  # fmt: skip
            async with asyncio.timeout(self.limits.timeout + _GRACE):
                await self.app(scope, receive, sent)
        except TimeoutError:
            logger.warning("request %s: the client did not take its answer in time; dropped", scope["afina"]["id"])
        except RequestError as refused:
            await respond(sent, refused.status, refused.body(), refused.headers)
        except Exception as error:
            logger.exception("request %s failed", scope["afina"]["id"])
            if not status:
                told = RequestError(500, internal(scope["afina"]["id"], error), code="internal_error")
                await respond(sent, 500, told.body(), {})
        finally:
            self.inside -= posted
            if posted:
                self._count(started)
            if self.metrics is not None:
                known = path if path in self.paths else "other"
                self.metrics.requests.labels(known, scope["afina"]["model"], str(status or 499)).inc()
                if posted:
                    self.metrics.seconds.labels(known).observe(time.monotonic() - started)

    def _check_key(self, scope: Any) -> None:
        """Raise RequestError (401) without the key. The comparison takes as long for a wrong one as for a right one."""
        if self.limits.api_key is None or scope["path"] in _OPEN:
            return
        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        right = hmac.compare_digest(key.strip(), self.limits.api_key.encode())
        if kind.lower() != b"bearer" or not right:
            why = "the API key is wrong" if given else "an API key is needed: the header Authorization: Bearer KEY"
            raise RequestError(401, why, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _count(self, started: float) -> None:
        now = time.monotonic()
        gap, self._last = max(now - self._last, 1e-6), now
        keep = 0.5 ** min(gap / 5.0, 60.0)
        self.rate = self.rate * keep + (1 - keep) / gap

    def _wait(self) -> int:
        """Seconds in which, at the rate of late, what is inside is done."""
        return int(min(60, max(1, round(self.inside / self.rate)))) if self.rate > 0 else 1


def internal(number: str, error: BaseException) -> str:
    """What a client is told of an error that is not its own: nothing of the inside but its kind."""
    return f"the request could not be computed ({type(error).__name__}); the server's log says more under {number}"


async def respond(send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    """Send a JSON body."""
    content = json.dumps(body, ensure_ascii=False).encode()
    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *given]})
    await send({"type": "http.response.body", "body": content})


async def read_body(scope: Any, receive: Receive, most: int) -> bytes:
    """The body of a request of at most `most` bytes. Raises RequestError (413, 415, and 400 where the client went away)."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        said = kind.decode("latin-1") or "none"
        raise RequestError(415, f"the content type is {said[:80]}; expected application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise RequestError(415, "the body is compressed; send it as it is")
    told = headers.get(b"content-length", b"0")
    if told.isdigit() and int(told) > most:
        raise _too_large(most)
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "the client went away while its request was read")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(most)
        if not message.get("more_body"):
            return b"".join(parts)


def _too_large(most: int) -> RequestError:
    return RequestError(413, f"the body is larger than {most:,} bytes (--max-body); send it in parts", code="body_too_large")
