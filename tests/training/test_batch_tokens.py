"""Steps counted in tokens: every row once an epoch, the same in parts and after a resume, within the plan."""

from __future__ import annotations

import pytest
import torch
from test_loop import fitted, places, prepared  # noqa: F401 (a fixture)

from afina.errors import ConfigError
from afina.training.plan import planner_for
from afina.training.recipe import MemoryOptions, Recipe, TrainingOptions
from afina.training.within_limit import within_limit


def test_an_epoch_has_every_row_once_and_steps_of_any_number_of_rows(places, tmp_path):  # noqa: F811
    lines = []
    run = prepared(places, tmp_path, batch_tokens=61, epochs=2)
    fitted(run, lambda line: lines.append(line) if "targets" in line else None)
    rows, steps = len(run.rows["train"].features), lines[0]["of"]
    assert len(lines) == steps
    for epoch in (1, 2):
        own = [line for line in lines if line["epoch"] == epoch]
        assert len(own) == steps // 2
        assert sum(line["targets"] for line in own) == rows
    assert len({line["targets"] for line in lines}) > 1


def test_t25_parts_of_like_length_change_no_result(places, tmp_path):  # noqa: F811
    lines: dict[int, list[float]] = {1: [], 3: []}
    weights = {}
    for count in lines:
        run = prepared(places, tmp_path / str(count), batch_tokens=61, gradient_accumulation=count, epochs=1)
        _, weights[count] = fitted(run, lambda line, n=count: lines[n].append(line["loss"]) if "loss" in line else None)
    assert lines[1] == pytest.approx(lines[3], rel=1e-4)
    for name, expected in weights[1].items():
        torch.testing.assert_close(weights[3][name], expected, rtol=1e-2, atol=2e-4)


def test_t3_a_resumed_run_goes_on_with_the_same_steps(places, tmp_path):  # noqa: F811
    lines: dict[str, dict[int, float]] = {"whole": {}, "rest": {}}
    run, again = (
        prepared(places, tmp_path, batch_tokens=61, epochs=2, checkpoint_every=1, keep_checkpoints=97) for _ in range(2)
    )
    _, whole = fitted(run, lambda line: lines["whole"].update({line["step"]: line["loss"]}) if "loss" in line else None)
    middle = len(lines["whole"]) // 2 + 1
    _, rest = fitted(
        again, lambda line: lines["rest"].update({line["step"]: line["loss"]}) if "loss" in line else None,
        resume=True, from_step=middle,
    )  # fmt: skip
    assert lines["rest"] == {step: loss for step, loss in lines["whole"].items() if step > middle}
    for name, weight in whole.items():
        assert torch.equal(rest[name], weight)


def test_a_budget_below_a_row_names_the_option_and_the_cure(places, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"batch_tokens=3: the longest training row has \d+ tokens; take at least"):
        prepared(places, tmp_path, batch_tokens=3)


def test_plans_follow_the_budget(places):  # noqa: F811
    def recipe(**training):
        memory = MemoryOptions(limit="11GB")
        return Recipe(model=places[0], training=TrainingOptions(max_length=61, precision="fp32", **training), memory=memory)

    def moving(**training):
        asked = recipe(evaluation_batch_size=1, **training)
        parts = planner_for(asked, "cpu").plan(asked).moments["train"].device
        return sum(parts.get(part, 0) for part in ("activations", "logits", "workspace"))

    assert moving(batch_tokens=61 * 13) == moving(batch_size=13)
    assert moving(batch_tokens=61 * 13) > 1.5 * moving(batch_tokens=61 * 7)
    assert moving(batch_tokens=61 * 13, gradient_accumulation=2) < moving(batch_tokens=61 * 13)
    asked = recipe(batch_tokens=61 * 1009)
    planner = planner_for(asked, "cpu")
    whole = planner.plan(asked).total
    asked.memory.limit = f"{int((planner.process + 0.6 * (whole - planner.process)) / 0.9)}B"  # of which a tenth stays free
    choice = within_limit(planner, asked)
    assert choice.fits
    assert choice.recipe.training.gradient_accumulation > 1
