from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import runs_made


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of runs by task or architecture, each trained when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in made:
            make = runs_made.task_run if name in runs_made.CASES else runs_made.language_run
            made[name] = make(name, folder / name)
        return made[name]

    return run


@pytest.fixture(scope="session")
def exports(runs, tmp_path_factory):
    """Exports by run and format, each made when it is first asked for; tests leave them as they are."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def export(run, name, **settings):
        key = (run, name, *sorted(settings.items()))
        if key not in made:
            made[key] = runs_made.exported(runs(run), name, folder / str(len(made)), **settings)
        return made[key]

    return export
