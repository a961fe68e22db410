"""Laws that every task meets by being found: the whole way of a run, two processes, resuming, answering as tested."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from every_task import CASES, EVERY, case, finished
from language_bases import save

from afina.core.files import read_weights
from afina.data.read import read_table
from afina.tasks.catalogue import tasks
from afina.training.engines.choose import make_engine
from afina.training.loop import fit
from afina.training.recipe import read_recipe
from afina.training.run import prepare
from afina.training.trained import TrainedRun

pytestmark = pytest.mark.xdist_group("every task")  # with the tests of their reports, which read the same runs


def test_every_task_has_a_case():
    assert set(EVERY) == set(tasks())


@pytest.fixture(scope="module", params=sorted(EVERY))
def done(request):
    return finished(request.param)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_leaves_figures_of_every_kind(done):
    folder, run, _ = done
    written = json.loads((folder / "run" / "metrics.json").read_text())
    for name, figure in run.task.figures.items():
        assert isinstance(written["test"][name], float | int | None), name
        assert figure.final or (name in written["validation"]), name
    assert written["test"]["rows"] == len(run.rows["test"].examples)
    assert written["baselines"]
    assert all(base["title"] for base in written["baselines"].values())
    assert written["read_back"]["largest_difference"] < 1e-4
    assert (folder / "run" / "report.html").is_file()
    assert losses(folder / "run")[-1] > 0


def test_the_saved_run_answers_as_it_was_tested(done):
    folder, _, _ = done
    trained = TrainedRun.load(folder / "run")
    with (folder / "run" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    table = read_table(folder / "run" / "data" / "test.csv", set(trained.columns.values()))
    rows = [{role: row[name] for role, name in trained.columns.items() if role != "label"} for row in table.rows]
    assert len(rows) == len(written)
    examples = trained.asked(rows, table.lines)
    for example, answer, line in zip(examples, trained.answers(examples), written, strict=True):
        said = trained.task.columns(answer, example)
        for title, value in said.items():
            if title not in line:
                continue  # what can be said of labelled rows alone
            try:
                assert float(value) == pytest.approx(float(line[title]), abs=2e-4)
            except ValueError:
                assert value == line[title]
        json.dumps(trained.task.respond(answer, example))


def test_t03_the_recipe_repeats_the_run_even_where_it_was_stopped(done, tmp_path):
    folder, _, metrics = done

    def die(line):
        if line.get("step") == 4 and "loss" in line:
            raise MemoryError

    recipe = read_recipe(folder / "run" / "recipe.yaml")
    recipe.training.checkpoint_every = 3
    with pytest.raises(MemoryError):
        prepare(recipe, tmp_path / "run").execute(die)
    again = prepare(recipe, tmp_path / "run", resume=True).execute()
    assert json.dumps(again["test"]) == json.dumps(metrics["test"])
    assert losses(tmp_path / "run") == losses(folder / "run")
    one, two = (read_weights(f / "adapter" / "adapter_model.safetensors") for f in (folder / "run", tmp_path / "run"))
    assert all((one[key] == two[key]).all() for key in one.keys() | two.keys())


@pytest.mark.parametrize("name", sorted(EVERY))
def test_t25_parts_of_a_step_change_no_loss(name, tmp_path):
    """Plain descent at a rate of one, so that the second step's loss tells of the first step's gradient."""
    found = {}
    for count in (1, 2, 4, 8):
        options = {"optimizer": "sgd", "learning_rate": 1.0, "warmup": 0.0, "max_grad_norm": 1e-2, "batch_size": 11}
        recipe = case(name, tmp_path, epochs=1, gradient_accumulation=count, evaluate_every=9.0, **options)
        run = prepare(recipe, tmp_path / str(count))
        rows, engine = run.rows, make_engine("fp32")
        fit(run.model, run.task, rows["train"], rows["validation"], run.recipe.training, engine, run.output)
        found[count] = losses(run.output)
    assert len(found[1]) >= 2
    for count in (2, 4, 8):
        assert found[count] == pytest.approx(found[1], rel=2e-4, abs=1e-6), count


def test_t25_two_processes_train_what_one_trains(tmp_path):
    """Every task and architecture in turn, in one pair of processes; the last step leaves one without rows of its own."""
    options, expected = {"epochs": 1, "batch_size": 4, "seed": 3}, {}

    def add(name, recipe, one):
        expected[name] = one
        recipe = copy.deepcopy(recipe)
        recipe.training.gradient_accumulation = 2
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")

    def add_alone(name, recipe):
        run = prepare(recipe, tmp_path / name / "one")
        run.execute()
        add(name, run.recipe, run.output)
        return run

    for name in CASES:
        folder, run, _ = finished(name)
        add(name, run.recipe, folder / "run")
    for name in ("causal_lm Llama", "causal_lm OPT", "seq2seq BART"):
        task, architecture = name.split()
        save(tmp_path / name / "base", architecture)
        add_alone(name, case(task, tmp_path / name, **options))
    # an adapter that the output does not depend on must not leave the processes waiting for its gradient
    lost = case("sentence_similarity", tmp_path / "unused", **options)
    lost.method = {"name": "lora", "r": 3, "target_modules": ["query", "pooler.dense"], "exclude_modules": []}
    assert any("pooler" in name for name in add_alone("unused", lost).model.adapters.layers)
    # pairs learn from all others of their step, those of the other process too
    pairs = case("sentence_similarity", tmp_path / "pairs", rows=32, **{**options, "batch_size": 7})
    rows = [json.loads(line) for line in Path(pairs.data.file).read_text().splitlines()]
    texts = [{key: row[key] for key in ("text", "text_pair")} for row in rows]
    Path(pairs.data.file).write_text("".join(json.dumps(row) + "\n" for row in texts))
    run = add_alone("pairs", pairs)
    assert run.task.learned["scored"] is False
    assert len(run.rows["train"].features) % 7 == 1
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(Path(__file__).with_name("two_processes_worker.py")), str(tmp_path),
        ],
        capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, one in expected.items():
        assert losses(tmp_path / name / "two") == pytest.approx(losses(one), rel=1e-3, abs=1e-6), name
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, tmp_path / name / "two")]
        first = next(iter(tasks().get(name.split()[0], tasks()["sentence_similarity"]).figures))
        values = [m["test"].get(first) for m in metrics]
        assert values[0] is None or values[1] == pytest.approx(values[0], rel=0.02, abs=0.02), name
