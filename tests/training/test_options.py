"""Every option of training does something, and what it says."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_loop import fitted, prepared
from tiny_bases import save_bert, write_rows

from afina.cli.assignments import section_options
from afina.errors import ConfigError, MissingDependencyError, Problems
from afina.training.optimizers import OPTIMIZERS, make_optimizer
from afina.training.recipe import Recipe


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    return str(save_bert(folder / "base")), str(write_rows(folder / "rows.csv", 59))


def told(places, output, **options):
    lines = []
    result, weights = fitted(prepared(places, output, **{"batch_size": 5, **options}), lines.append)
    return result, weights, lines


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill_its_own_way(name):
    """A quadratic with two matrices, one of them large enough for states of 8 bits."""
    if name.startswith("paged"):
        with pytest.raises(ConfigError, match=r"optimizer=paged_adamw_8bit.*use adamw_8bit"):
            make_optimizer(name, {"x": torch.nn.Parameter(torch.zeros(3))}, 1e-3, 0.0)
        return
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    weights = {"large": torch.nn.Parameter(torch.full((67, 101), 3.0)), "vector": torch.nn.Parameter(torch.full((7,), 3.0))}
    optimizer = make_optimizer(name, weights, 0.05, 0.0)
    for _ in range(30):
        optimizer.zero_grad()
        sum((p**2).mean() for p in weights.values()).backward()
        optimizer.step()
    assert weights["vector"].mean() < 2.9
    state = optimizer.state[weights["large"]]
    assert any(t.dtype == torch.uint8 for t in state.values() if torch.is_tensor(t)) == name.endswith("8bit")
    assert type(optimizer).__name__.lower() == name.replace("_", "")
    if name == "adamw":
        assert optimizer.defaults["fused"]


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_matrices_decay_and_vectors_do_not(name):
    weights = {"matrix": torch.nn.Parameter(torch.ones(5, 3)), "vector": torch.nn.Parameter(torch.ones(5))}
    optimizer = make_optimizer(name, weights, 0.1, 0.5)
    sum(p.sum() * 0 for p in weights.values()).backward()
    optimizer.step()
    assert (weights["matrix"] < 1).all()
    assert (weights["vector"] == 1).all()


def test_bitsandbytes_that_is_absent_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(MissingDependencyError, match=r"afina\[bitsandbytes\]"):
        make_optimizer("lion_8bit", {"x": torch.nn.Parameter(torch.zeros(3))}, 1e-3, 0.0)


@pytest.mark.parametrize(
    "option",
    [
        {"optimizer": "sgd"}, {"schedule": "cosine"}, {"schedule": "constant"}, {"warmup": 0.5}, {"weight_decay": 0.9},
        {"max_grad_norm": 1e-3}, {"label_smoothing": 0.3}, {"learning_rate": 1e-4}, {"seed": 3},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_changes_what_is_learnt(places, tmp_path, option):
    common = {"epochs": 1, "evaluate_every": 99.0}
    _, plain, _ = told(places, tmp_path / "plain", **common)
    _, other, _ = told(places, tmp_path / "other", **common, **option)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_label_smoothing_is_of_the_training_loss_alone(places, tmp_path):
    run = prepared(places, tmp_path, label_smoothing=0.3)
    batch = run.task.collate(run.rows["train"].features[:3])
    run.model.eval()
    hard = run.task.loss_sum(run.model, batch)
    run.task.label_smoothing = 0.3
    uniform = -torch.log_softmax(run.task.logits(run.model, batch), -1).mean(-1).sum()
    torch.testing.assert_close(run.task.loss_sum(run.model, batch), 0.7 * hard + 0.3 * uniform)


@pytest.mark.parametrize(
    ("every", "unit", "expected"),
    [(1.0, "epochs", [9, 18]), (0.5, "epochs", [5, 9, 14, 18]), (7, "steps", [7, 14, 18]), (3.0, "epochs", [18])],
)
def test_evaluations_come_when_asked(places, tmp_path, every, unit, expected):
    _, _, lines = told(places, tmp_path, evaluate_every=every, evaluate_unit=unit)
    assert lines[0]["of"] == 18
    steps = [line["step"] for line in lines if "validation_loss" in line]
    assert steps == expected
    epochs = [line["epoch"] for line in lines if "validation_loss" in line]
    assert epochs == pytest.approx([step / 9 for step in steps], abs=0.006)


def test_patience_ends_the_run_with_the_best_weights(places, tmp_path):
    run = prepared(places, tmp_path, epochs=9, patience=2, batch_size=5, best="accuracy")
    answers, seen, original = itertools.chain([0.2, 0.8, 0.1, 0.3], itertools.repeat(1.0)), [], run.task.metrics

    def metrics(probabilities, targets):
        seen.append({n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad})
        return {**original(probabilities, targets), "accuracy": next(answers)}

    run.task.metrics = metrics
    result, weights = fitted(run)
    assert len(seen) == 4
    assert (result.steps, result.best_epoch, result.best_step) == (36, 2, 18)
    assert all(torch.equal(weights[name], seen[1][name]) for name in weights)
    again, _ = fitted(run, resume=True)  # patience has run out there, too
    assert again.steps == 36


def test_options_as_typed():
    problems, recipe = Problems("train"), Recipe()
    typed = ["training.patience=2", "training.evaluate-every=0.5", "r=3", "training.optimiser=sgd", "training.schedule=5.x"]
    assert section_options([*typed, "training.keep_checkpoints=few"], recipe, problems) == ["r=3"]
    assert (recipe.training.patience, recipe.training.evaluate_every) == (2, 0.5)
    assert "Did you mean 'optimizer'" in problems.found[0]
    assert "keep_checkpoints=few: expected a whole number" in problems.found[1]
    recipe.check(problems)
    assert "schedule='5.x': expected one of 'linear'" in problems.found[2]
