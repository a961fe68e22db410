"""What transformers, torch and PEFT say that is not about us."""

from __future__ import annotations

import pytest

SAID_BY_OTHERS = (
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
    "ignore:Failed to load CPU gemm",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "interop" in str(item.path):
            for said in SAID_BY_OTHERS:
                item.add_marker(pytest.mark.filterwarnings(said))
