"""What one server takes at most. Every limit has its own answer, so that a client knows what to change."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MAX_CHOICES", "MAX_INPUTS", "MAX_STOPS", "Limits"]

MAX_INPUTS = 2048  # texts of one request, as OpenAI's
MAX_CHOICES = 16  # `n`: answers to one prompt
MAX_STOPS = 4  # stop sequences, as OpenAI's


@dataclass(frozen=True)
class Limits:
    """Options of `afina serve`."""

    max_body: int = 1_000_000  # bytes of a request; 413 beyond
    queue: int = 512  # requests inside at once, waiting or being answered; 429 beyond
    timeout: float = 120.0  # seconds a request may take; 408 while its body is read, 504 after
    max_batch: int = 32  # rows of one forward pass
    max_tokens: int = 8192  # of the prompts that are read in one pass, padding counted; at least one prompt is
    api_key: str | None = None  # 401 without it
