"""What Prometheus reads at /metrics: each app has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and gauges; labels are the paths and models that there are, so that no client can make new ones."""

    def __init__(self, waiting: Callable[[], int], inside: Callable[[], int]):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**known)
        self.requests = Counter("afina_requests_total", "Requests answered.", ["path", "model", "status"], **known)
        self.seconds = Histogram(
            "afina_request_seconds", "From the first byte read to the last one sent.", ["path"], buckets=_SECONDS, **known
        )
        self.tokens = Counter(
            "afina_tokens_total", "Tokens read (prompt) or written (completion).", ["model", "kind"], **known
        )
        self.rows = Histogram(
            "afina_batch_rows", "Rows of a forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **known
        )  # fmt: skip
        self.adapters = Histogram(
            "afina_batch_adapters", "Different adapters in a forward pass.", buckets=(1, 2, 3, 4, 8, 16), **known
        )
        Gauge("afina_waiting", "Pieces of work that wait for the model.", **known).set_function(waiting)
        Gauge("afina_requests_inside", "Requests waiting or being answered.", **known).set_function(inside)

    def batch(self, rows: int, adapters: int) -> None:
        """A forward pass."""
        self.rows.observe(rows)
        self.adapters.observe(adapters)

    def text(self) -> bytes:
        """The exposition format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
