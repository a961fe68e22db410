"""What a client is told when its request is not answered, in OpenAI's form of an error."""

from __future__ import annotations

from typing import Any

__all__ = ["RequestError"]

_TYPES = {
    401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error", 500: "server_error",
    503: "server_error", 504: "timeout_error",
}  # fmt: skip


class RequestError(Exception):
    """A request that gets an error: HTTP status, reason and, where there is one, the parameter it is about."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
