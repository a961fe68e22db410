"""The loop: what must not change a run does not, and what cannot work stops it."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tiny_bases import save_bert, write_rows

from afina.errors import AfinaError, CheckpointError, ConfigError, TrainingError
from afina.training import checkpoints
from afina.training.loop import _stop_unless_moved, fit, make_engine
from afina.training.precision import choose_precision, slow_precision
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    return str(save_bert(folder / "base")), str(write_rows(folder / "rows.csv"))


def prepared(places, output, method=None, **options):
    options = {"epochs": 2, "batch_size": 7, "learning_rate": 5e-3, "precision": "fp32", **options}
    recipe = Recipe(
        model=places[0],
        data=DataOptions(file=places[1], text="message", label="label"),
        method=method or {"name": "lora", "r": 3},
        training=TrainingOptions(**options),
    )
    return prepare(recipe, output)


def fitted(run, tell=lambda line: None, **resumed):
    engine = make_engine("fp32")
    result = fit(
        run.model, run.task, run.rows["train"], run.rows["validation"], run.recipe.training, engine, run.output,
        tell=tell, **resumed,
    )  # fmt: skip
    return result, {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("count", [2, 3, 7])
def test_t25_accumulation_changes_no_result(places, tmp_path, count):
    """Parts of unequal size weigh as many targets as they have."""
    lines: dict[int, list[float]] = {1: [], count: []}
    weights = {}
    for parts in lines:
        run = prepared(places, tmp_path / str(parts), gradient_accumulation=parts, epochs=1)
        _, weights[parts] = fitted(run, lambda line, n=parts: lines[n].append(line["loss"]) if "loss" in line else None)
    assert lines[1] == pytest.approx(lines[count], rel=1e-4)
    for name, expected in weights[1].items():
        torch.testing.assert_close(weights[count][name], expected, rtol=1e-2, atol=2e-4)


def test_loss_of_the_first_step_is_the_mean_over_its_rows(places, tmp_path):
    run = prepared(places, tmp_path, epochs=1, batch_size=97)
    untouched = copy.deepcopy(run.model).eval()
    rows = run.rows["train"]
    with torch.no_grad():
        expected = run.task.loss_sum(untouched, run.task.collate(rows.features)) / len(rows.ids)
    lines = []
    fitted(run, lines.append)
    assert lines[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert lines[0]["targets"] == len(rows.ids)


def test_the_base_does_not_move_and_the_adapter_does(places, tmp_path):
    run = prepared(places, tmp_path)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    fitted(run)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_t10_an_adapter_that_does_not_move_stops_the_run(places, tmp_path, decay):
    run = prepared(places, tmp_path)
    with (
        run.model.disable_adapter(),
        pytest.raises((TrainingError, RuntimeError), match=r"adapter weights|does not require grad"),
    ):
        fitted(run)
    for layer in run.model.adapters.layers.values():  # the head still trains, the adapter is multiplied by nothing
        for adapter in layer.adapters.values():
            if type(adapter).__name__ == "LoRA":
                adapter.scaling = 0.0
    run.recipe.training.weight_decay = decay  # which moves weights, but teaches nothing
    with pytest.raises(TrainingError, match=r"none of the .* adapter weights has changed"):
        fitted(run)


@pytest.mark.parametrize("moved", [0.0, 1e-7, 3e-7])
@pytest.mark.parametrize("decayed", [1.0, 1.0 - 1e-9, 1.0 - 1e-4])
def test_t10_what_the_rate_of_a_warmup_moves_has_moved(moved, decayed):
    """In float32 the neighbours of 1 are 6e-8 and 1.2e-7 away."""
    before = {"ones": torch.ones(17), "others": torch.randn(11, 3, generator=torch.Generator().manual_seed(0))}
    after = {name: weight * decayed - moved for name, weight in before.items()}
    if moved:
        _stop_unless_moved(before, before, after, decayed, 3, "")
    else:
        with pytest.raises(TrainingError, match=r"none of the 2 adapter weights has changed in the first 3 steps"):
            _stop_unless_moved(before, before, after, decayed, 3, "")


def test_a_loss_that_is_no_number_stops_the_run(places, tmp_path):
    run = prepared(places, tmp_path)
    original = run.task.loss_sum
    run.task.loss_sum = lambda model, batch: original(model, batch) * math.nan
    with pytest.raises(TrainingError, match=r"loss is nan at step 1 .*lower learning rate"):
        fitted(run)


def test_the_best_epoch_is_kept(places, tmp_path):
    """Whatever validation says was best is what the model holds at the end."""
    run = prepared(places, tmp_path, epochs=3, best="accuracy")
    accuracies = iter([0.3, 0.9, 0.5])
    seen = []
    metrics = run.task.metrics

    def told(probabilities, targets):
        seen.append({n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad})
        return {**metrics(probabilities, targets), "accuracy": next(accuracies)}

    run.task.metrics = told
    result, weights = fitted(run)
    assert result.best_epoch == 2
    for name, value in weights.items():
        assert torch.equal(value, seen[1][name])


def test_a_resumed_run_is_the_run_that_never_stopped(places, tmp_path):
    whole, stopped = [], []
    _, expected = fitted(prepared(places, tmp_path / "whole", epochs=3), whole.append)

    def stop(line):
        stopped.append(line)
        if line["epoch"] == 3 and "loss" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(prepared(places, tmp_path / "again", epochs=3), stop)
    again = []
    run = prepared(places, tmp_path / "elsewhere", epochs=3)
    run.output = tmp_path / "again"
    result, weights = fitted(run, again.append, resume=True)
    without_clock = [{k: v for k, v in line.items() if k != "seconds"} for line in whole]
    logged = [json.loads(line) for line in (tmp_path / "again" / "log.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in logged] == without_clock
    assert again[0]["epoch"] == 3
    assert result.steps == whole[-1]["step"]
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_a_checkpoint_of_another_model_is_refused(places, tmp_path):
    fitted(prepared(places, tmp_path / "first", epochs=1))
    run = prepared(places, tmp_path / "second", method={"name": "lora", "r": 5}, epochs=2)
    run.output = tmp_path / "first"
    with pytest.raises(CheckpointError, match="does not fit this model"):
        fitted(run, resume=True)


def test_an_unfinished_checkpoint_is_not_taken(tmp_path):
    (tmp_path / "step-3").mkdir()
    (tmp_path / ".step-4.1").mkdir()
    assert checkpoints.latest(tmp_path) is None
    (tmp_path / "step-10").mkdir()
    (tmp_path / "step-9").mkdir()
    for name in ("step-10", "step-9"):
        (tmp_path / name / "state.json").write_text("{}")
    assert checkpoints.latest(tmp_path).name == "step-10"


def test_t45_fp16_on_a_cpu_names_the_alternative():
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"fp16.*use (bf16|fp32)"):
        choose_precision("fp16", cpu)
    assert choose_precision("fp32", cpu) == "fp32"
    assert choose_precision("auto", cpu) in ("fp32", "bf16")


@pytest.mark.parametrize("native", [False, True])
def test_t45_bf16_by_detours_is_told(monkeypatch, native):
    cpu = torch.device("cpu")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    assert choose_precision("auto", cpu) == ("bf16" if native else "fp32")
    assert choose_precision("bf16", cpu) == "bf16"
    assert bool(slow_precision("bf16", cpu)) is not native
    assert not slow_precision("fp32", cpu)


def test_t44_processes_that_do_not_see_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises((AfinaError, ValueError), match=r"train alone|environment variable"):
        make_engine("fp32")
