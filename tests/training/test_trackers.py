"""What trackers are sent is what the log holds; each real library writes its own files, which are read back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from afina.errors import ConfigError, Problems
from afina.training.trackers import TRACKERS, Trackers, check_trackers

RECIPE = {"model": "some/base", "method": {"name": "lora", "target_modules": ["query", "value"]}, "training": {"best": None}}
STEPS = [{"epoch": 1, "step": n, "of": 3, "loss": 1 / n, "learning_rate": 0.1 / n, "gradient_norm": 2.0} for n in (1, 2, 3)]
EVALUATION = {"epoch": 1, "step": 3, "train_loss": 0.5, "best": True, "seconds": 1.0, "validation_loss": 0.25,
              "validation_macro_f1": 0.75}  # fmt: skip
FIGURES = {"loss": 0.125, "rows": 7, "labels": ["a"], "per_class": {"a": {}}}


def send(names, folder, steps=STEPS, **more):
    folder.mkdir(exist_ok=True)
    PartialState(cpu=True)
    with Trackers(names, folder, RECIPE, **more) as trackers:
        for line in steps:
            trackers(line)
        trackers(EVALUATION)
        trackers.tested(FIGURES)


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own protocol files
def test_tensorboard_is_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send(["tensorboard", "tensorboard"], tmp_path / "run")
    folder = tmp_path / "run" / "tensorboard"
    assert len(list(folder.glob("events*"))) == 1
    events = EventAccumulator(str(folder)).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "train/loss": [(n, pytest.approx(1 / n)) for n in (1, 2, 3)],
        "train/learning_rate": [(n, pytest.approx(0.1 / n)) for n in (1, 2, 3)],
        "train/gradient_norm": [(n, 2.0) for n in (1, 2, 3)],
        "validation/loss": [(3, 0.25)],
        "validation/macro_f1": [(3, 0.75)],
        "test/loss": [(3, 0.125)],
        "test/rows": [(3, 7.0)],
    }
    options = next(folder.rglob("hparams.yml")).read_text()
    assert "method.target_modules: '[''query'', ''value'']'" in options
    assert "training.best: None" in options

    send(["tensorboard"], tmp_path / "run", [{**STEPS[2], "loss": 7.0}], step=2)
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 7.0)]


@pytest.mark.parametrize("name", [n for n in TRACKERS if n != "tensorboard"])
def test_the_others_write_their_own_files(name, tmp_path):
    """In a process of its own, since some finish writing when it ends."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    places = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "store"),
              "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/store.db", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trackers import send
send([{name!r}], Path("first run"))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | places, capture_output=True, check=True)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for part in (b"train/learning_rate", b"validation/macro_f1", b"test/loss", b"first run", b"some/base"):
        assert part in written, part


def test_unknown_and_missing_trackers_are_told_together(monkeypatch):
    problems = Problems("the recipe")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(["tensorbord", "tensorboard", "mlflow"], problems, lambda place: f"<{place}>")
    with pytest.raises(ConfigError) as told:
        problems.raise_as(ConfigError)
    said = str(told.value)
    for part in ("3 problems", "<training.trackers>=tensorbord", "'tensorboard'?", "pip install 'afina[tensorboard]'",
                 "pip install mlflow"):  # fmt: skip
        assert part in said, said


def test_a_tracker_that_does_not_begin_ends_the_others(tmp_path):
    pytest.importorskip("tensorboard")
    PartialState(cpu=True)
    (tmp_path / "tensorboard").write_text("in the way")
    with (
        pytest.raises(ConfigError, match=r"training\.trackers=tensorboard: it did not begin"),
        Trackers(["tensorboard"], tmp_path, RECIPE),
    ):
        pass


def test_without_trackers_nothing_is_imported(tmp_path):
    code = f"""
import sys
from pathlib import Path
from afina.training.trackers import Trackers
with Trackers([], Path({str(tmp_path)!r}), {{}}) as trackers:
    trackers({STEPS[0]!r})
    trackers.tested({FIGURES!r})
print(sorted({{m.split('.')[0] for m in sys.modules}} & {{'accelerate', {", ".join(map(repr, TRACKERS))}}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())
