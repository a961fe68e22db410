"""Every engine trains what one process trains, comes back whole after it was killed, and is what was asked for.

Two processes each; see engine_worker.py. The runs that are compared with have one process and no engine to speak of.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_bases import WORDS, save_bert, write_rows

sys.path.append(str(Path(__file__).parents[1] / "tasks"))

from every_task import case

from afina.core.files import read_weights
from afina.errors import MissingDependencyError, Problems, TrainingError
from afina.training.engines import choose
from afina.training.engines.choose import check_engine, make_engine
from afina.training.recipe import DataOptions, DistributedOptions, MemoryOptions, Recipe, TrainingOptions

DEATH = 5  # the step after which a run is killed; its last checkpoint is older
ENGINES = {
    "ddp": {"engine": "ddp"},
    "fsdp2": {"engine": "fsdp2", "options": {"memory.gradient_checkpointing": True}},
    "zero2": {"engine": "zero2", "offload": True},
    "zero3": {"engine": "zero3", "offload": True, "options": {"memory.gradient_checkpointing": True}},
}
TASKS = {"pairs": "zero3", "causal_lm": "fsdp2"}  # what shares within a step, and what generates
MOVES = [("zero3", "fsdp2", 2), ("fsdp2", "ddp", 1)]  # killed under one engine, resumed under another

pytestmark = pytest.mark.xdist_group("engines")


def recipe_of_rows(folder):
    """Gradients are cut and a step is computed in parts; the last step of an epoch leaves a process without a row."""
    options = {"epochs": 2, "batch_size": 5, "gradient_accumulation": 2, "max_grad_norm": 0.05, "learning_rate": 5e-3,
               "precision": "fp32", "checkpoint_every": 3}  # fmt: skip
    return Recipe(
        model=str(save_bert(folder / "base")),
        data=DataOptions(file=str(write_rows(folder / "rows.csv", 43)), text="message", label="label"),
        method={"name": "lora", "r": 3, "target_modules": "all-linear"},
        training=TrainingOptions(**options),
    )


def recipe_of_pairs(folder):
    """Rows whose loss depends on the others of the step."""
    folder.mkdir()
    chance = random.Random(0)
    texts = [[" ".join(chance.choices(WORDS, k=7)) for _ in range(2)] for _ in range(30)]
    lines = [{"text": first, "text_pair": second} for first, second in texts]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Recipe(
        task={"name": "sentence_similarity"},
        model=str(save_bert(folder / "base")),
        data=DataOptions(file=str(folder / "rows.jsonl"), text="text", text_pair="text_pair"),
        training=TrainingOptions(epochs=1, batch_size=5, gradient_accumulation=2, precision="fp32", learning_rate=2e-4),
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Everything that two processes do here, in one go: what each process of each run said, by the name of the run."""
    folder = tmp_path_factory.mktemp("engines")
    recipes = {"rows": recipe_of_rows(folder), "pairs": recipe_of_pairs(folder / "pairs")}
    recipes["causal_lm"] = case("causal_lm", folder / "causal_lm", epochs=1, batch_size=4, gradient_accumulation=2)
    jobs = {}
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        jobs[f"1 {name}"] = {"recipe": f"../{name}.yaml", "engine": "ddp", "processes": 1}
    for name, job in ENGINES.items():
        jobs[f"2 {name} killed"] = {**job, "recipe": "../rows.yaml", "die_at": DEATH}
        jobs[f"4 {name} resumed"] = {**job, "recipe": "../rows.yaml", "output": f"../2 {name} killed/run", "resume": True}
    for old, new, count in MOVES:
        copied = {"copy": f"../2 {old} killed/run", "output": "run", "resume": True}
        jobs[f"3 {old} {new}"] = {"engine": new, "recipe": "../rows.yaml", "processes": count, **copied}
    jobs |= {f"5 {name}": {"engine": engine, "recipe": f"../{name}.yaml"} for name, engine in TASKS.items()}
    jobs["6 broken"] = {"engine": "ddp", "recipe": "../rows.yaml", "broken_rank": 1}
    for name, job in jobs.items():
        (folder / name).mkdir()
        (folder / name / "job.json").write_text(json.dumps({"output": "run", **job}), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("engine_worker.py")), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = {}
    for name, job in jobs.items():
        files = [folder / name / f"process-{i}.json" for i in range(job.get("processes", 2))]
        said[name] = [json.loads(file.read_text()) if file.is_file() else None for file in files]
    return folder, said


def logged(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def same(run, one):
    """Losses from the first step on, and the adapter, as those of one process that never stopped."""
    assert logged(run) == pytest.approx(logged(one), rel=1e-5)
    found, expected = (read_weights(r / "adapter" / "adapter_model.safetensors") for r in (run, one))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4)
    kept = [json.loads((r / "adapter" / "afina.json").read_text())["base"] for r in (run, one)]
    assert kept[0] == kept[1]  # the base's fingerprint is of whole weights
    metrics = [json.loads((r / "metrics.json").read_text()) for r in (run, one)]
    assert metrics[0]["test"]["loss"] == pytest.approx(metrics[1]["test"]["loss"], rel=1e-5)
    assert metrics[0]["read_back"]["largest_difference"] < 1e-4
    for key in ("trainable_parameters", "total_parameters", "best_epoch", "steps"):
        assert metrics[0]["train"][key] == metrics[1]["train"][key], key
    return metrics[0]["train"]


@pytest.mark.parametrize("name", ENGINES)
def test_t25_t36_killed_and_resumed_is_what_one_process_trains(found, name):
    folder, said = found
    killed = said[f"2 {name} killed"]
    assert killed[0] is None  # it was really killed
    assert killed[1]["error"].startswith("LostProcessError"), killed[1]["where"]
    assert killed[1]["seconds"] < 60
    again = said[f"4 {name} resumed"]
    assert all("error" not in one for one in again), [one.get("where") for one in again]
    assert 0 < len(again[0]["losses"]) < len(logged(folder / "1 rows" / "run"))  # it did not begin anew
    same(folder / f"2 {name} killed" / "run", folder / "1 rows" / "run")


@pytest.mark.parametrize(("old", "new", "count"), MOVES)
def test_t36_another_engine_or_number_of_processes_goes_on(found, old, new, count):
    folder, said = found
    assert all("error" not in one for one in said[f"3 {old} {new}"]), said[f"3 {old} {new}"][0].get("where")
    assert same(folder / f"3 {old} {new}" / "run", folder / "1 rows" / "run")["processes"] == count


@pytest.mark.parametrize("task", TASKS)
def test_t25_tasks_that_share_and_generate(found, task):
    folder, said = found
    both = said[f"5 {task}"]
    assert all("error" not in one for one in both), [one.get("where") for one in both]
    same(folder / f"5 {task}" / "run", folder / f"1 {task}" / "run")
    assert both[0]["metrics"]["test"] == both[1]["metrics"]["test"]


@pytest.mark.parametrize("name", ENGINES)
def test_t44_what_was_built_is_what_was_asked(found, name):
    built = found[1][f"4 {name} resumed"][0]["metrics"]["train"]
    assert (built["engine"], built["processes"]) == (name, 2)
    share = built["weights_bytes_of_a_process"] / built["weights_bytes"]
    assert share == 1 if name in ("ddp", "zero2") else 0.5 <= share < 0.56  # shards are padded


def test_a_process_that_breaks_ends_the_others(found):
    both = found[1]["6 broken"]
    assert both[1]["error"] == "ValueError: something broke"
    assert "LostProcessError: process 0 lost another one of 2" in both[0]["error"]
    assert both[0]["seconds"] < 60


def test_checkpoints_hold_trained_weights_alone(found):
    folder, _ = found
    for name in ENGINES:
        checkpoint = max((folder / f"2 {name} killed" / "run" / "checkpoints").iterdir())
        keys = read_weights(checkpoint / "weights.safetensors").keys()
        assert keys == read_weights(checkpoint / "best.safetensors").keys()
        assert all(".adapters." in key for key in keys), name


# --- without processes


def asked(tmp_path, engine, training=None, offload=False, weights="fp32"):
    recipe = Recipe(
        distributed=DistributedOptions(engine=engine, offload=offload),
        training=TrainingOptions(**(training or {})),
        memory=MemoryOptions(weights=weights),
    )
    problems = Problems("the recipe")
    check_engine(recipe, (training or {}).get("precision", "fp32"), problems)
    return problems.found


def test_what_an_engine_cannot_do_is_told_together(tmp_path, monkeypatch):
    assert not asked(tmp_path, "ddp", {"optimizer": "adafactor"}, weights="nf4")
    assert not asked(tmp_path, "zero2", weights="nf4")
    found = asked(tmp_path, "fsdp2", {"optimizer": "adamw_8bit", "precision": "fp16"}, weights="int8")
    assert len(found) == 3
    assert "take adamw or sgd, or engine ddp" in found[0]
    assert "take bf16 or fp32" in found[1]
    assert "memory.weights=int8 cannot be cut into shards" in found[2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "give a number of parts" in asked(tmp_path, "zero3", {"gradient_accumulation": "auto"})[0]
    recipe = Recipe(distributed=DistributedOptions(engine="zero3"), method={"name": "p_tuning"})
    problems = Problems("the recipe")
    check_engine(recipe, "fp32", problems)
    assert "take engine fsdp2 or zero2" in problems.found[0]
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'afina[deepspeed]'" in asked(tmp_path, "zero3")[0]


def test_each_process_needs_a_device_where_there_are_some(tmp_path, monkeypatch):
    monkeypatch.setattr(choose.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(choose.torch.accelerator, "device_count", lambda: 3)
    for here in (1, 3):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        assert not asked(tmp_path, "ddp")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    told = "--processes 5: this machine has 3 devices, and each process needs one; take at most 3"
    assert asked(tmp_path, "ddp") == [told]


def test_without_deepspeed_its_engines_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'afina\[deepspeed\]'"):
        make_engine("fp32", "zero3")


def test_a_configuration_of_accelerate_for_another_engine_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match=r"configuration for FSDP.*--engine"):
        make_engine("fp32")


def test_deepspeed_is_imported_by_its_own_engines_alone(tmp_path):
    recipe = recipe_of_rows(tmp_path)
    recipe.training.epochs = 1
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    words = ["afina", "train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run"), "--quiet"]
    code = f"import sys; sys.argv = {words!r}; from afina.cli.main import app; app(standalone_mode=False); "
    code += "print('deepspeed' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "False\n"  # and nothing else was said there
