"""What all tests share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

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


# Their tests share finished runs across files.
SHARING = ("export", "serving")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """What several tests share is made in one process (`-n 2 --dist loadgroup`) instead of in each."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None and any(map(_shared, item._fixtureinfo.name2fixturedefs.values())):
            folder = item.path.parent
            item.add_marker(pytest.mark.xdist_group(folder.name if folder.name in SHARING else str(item.path)))


def _shared(definitions: Sequence[pytest.FixtureDef[object]]) -> bool:
    """Whether a fixture is one of these tests' own that outlives a test."""
    made = definitions[-1]
    return made.scope != "function" and Path(made.func.__code__.co_filename).is_relative_to(Path(__file__).parent)
