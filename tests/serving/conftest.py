from __future__ import annotations

import pytest
import serving_runs

from afina.serving.app import make_app
from afina.serving.limits import Limits
from afina.serving.models import load_models
from afina.serving.trial import try_out


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Folders of finished runs by name."""
    return serving_runs.make_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def writers(tmp_path_factory):
    """The same, of models that write."""
    return serving_runs.make_writers(tmp_path_factory.mktemp("writers"))


@pytest.fixture(scope="session")
def models(encoders, writers):
    """All of them loaded, on as few bases as there can be."""
    made = load_models({**encoders, **writers})
    try_out(made)
    return made


@pytest.fixture(scope="session")
def address(models):
    """A real server that answers with all of them."""
    with serving_runs.running(make_app(models, Limits(max_body=40_000, max_batch=7, timeout=60.0))) as found:
        yield found
