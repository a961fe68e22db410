"""What all tests share."""

from __future__ import annotations

import os
import tempfile

CACHE = tempfile.TemporaryDirectory(prefix="afina-tests-")  # removed when the process ends
os.environ["AFINA_CACHE"] = CACHE.name
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
