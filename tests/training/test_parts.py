"""`auto`: how many rows are computed at once is found by measuring, and changes no result."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from test_loop import fitted, places, prepared  # noqa: F401 (a fixture)

from afina.errors import ConfigError, TrainingError
from afina.training.loop import make_engine
from afina.training.parts import largest_size, settle_parts

CPU, MB = torch.device("cpu"), 2**20


# In a process of its own, whose memory nothing else takes and gives back meanwhile. Each row takes 37 MB; the budget counts
# from what is in use.
_SEARCHES = """
import json
import torch
from afina.memory.measure import measured
from afina.training.parts import largest_size
CPU, MB = torch.device("cpu"), 2**20

def run(size):
    tried.append(size)
    torch.ones(size * 37 * MB // 4)

for most, budget in json.loads(input()):
    tried = []
    with measured(CPU) as now:
        pass
    size, peak = largest_size(run, most, CPU, now.before + budget * MB)
    print(json.dumps([size, (peak - now.before) / MB, tried]))
"""


def test_the_largest_size_that_fits_is_found_without_trying_what_does_not():
    asked = {(13, 10**4): 13, (13, 400): 8, (13, 250): 4, (13, 100): 2, (1, 10**4): 1, (3, 10**4): 3}
    done = subprocess.run(
        [sys.executable, "-c", _SEARCHES], input=json.dumps(list(asked)), capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case, line in zip(asked, done.stdout.splitlines(), strict=True):
        size, peak, tried = json.loads(line)
        assert size == asked[case], case
        assert peak == pytest.approx(size * 37, rel=0.15, abs=20), case
        assert max(tried) <= max(2, size), case


def test_what_runs_out_of_memory_ends_the_search_and_single_rows_that_do_end_the_run():
    def run(size):
        if size > 4:
            torch.empty(2**60, dtype=torch.uint8)

    assert largest_size(run, 16, CPU, 2**60)[0] == 4
    with pytest.raises(RuntimeError, match="allocate"):
        largest_size(lambda size: run(8), 16, CPU, 2**60)


def test_measuring_leaves_nothing_behind(places, tmp_path):  # noqa: F811
    run = prepared(places, tmp_path, batch_size="auto")
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    state = torch.get_rng_state()
    told = settle_parts(run.model, run.task, run.rows, run.recipe, make_engine("fp32"))
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]), name
    options = run.recipe.training
    assert (options.batch_size, options.gradient_accumulation, options.evaluation_batch_size) == (16, 1, 32)
    assert "16 of the 16 rows of a step fit at once" in told[0]


def test_a_limit_makes_more_parts_and_the_same_run(places, tmp_path, monkeypatch):  # noqa: F811
    """Half the rows of a step are too many: what is learned is what all at once would have taught."""
    from afina.training import parts

    _, expected = fitted(prepared(places, tmp_path / "plain", batch_size=16, epochs=1))
    run = prepared(places, tmp_path / "auto", batch_size="auto", epochs=1)
    monkeypatch.setattr(parts, "largest_size", lambda work, most, device, budget: (min(most, 3), 0))
    settle_parts(run.model, run.task, run.rows, run.recipe, make_engine("fp32"))
    assert (run.recipe.training.gradient_accumulation, run.recipe.training.evaluation_batch_size) == (6, 3)
    _, found = fitted(run)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=2e-4)


def test_a_limit_that_holds_no_row_says_what_would_make_it_less(places, tmp_path):  # noqa: F811
    run = prepared(places, tmp_path, batch_size="auto")
    run.recipe.memory.limit = "90MB"  # less than Python itself takes
    with pytest.raises(TrainingError, match=r"one row alone takes .* checkpointing"):
        settle_parts(run.model, run.task, run.rows, run.recipe, make_engine("fp32"))


def test_a_run_with_auto_writes_what_it_found_into_its_recipe(places, tmp_path):  # noqa: F811
    run = prepared(places, tmp_path / "run", batch_size="auto", epochs=1)
    metrics = run.execute()
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    assert written["training"]["batch_size"] == 16
    assert written["training"]["gradient_accumulation"] == 1
    assert "rows of a step fit at once" in metrics["train"]["notes"][0]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]["notes"] == metrics["train"]["notes"]


@pytest.mark.parametrize("wrong", [0, -3, "many", 2.5, True])
def test_what_is_no_number_of_rows_is_refused(places, tmp_path, wrong):  # noqa: F811
    with pytest.raises(ConfigError, match=r"training\.batch_size=.*(at least 1, or auto)"):
        prepared(places, tmp_path, batch_size=wrong)
