"""What all tests share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ["AFINA_CACHE"] = tempfile.mkdtemp(prefix="afina-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["AFINA_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
