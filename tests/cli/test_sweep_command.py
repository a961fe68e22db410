"""`afina sweep` as it is typed: grids, parts, resuming, what is wrong with them, and what it prints."""

from __future__ import annotations

import json
import shutil

import pytest

PLAIN = ["--text", "message", "--label", "label", "--epochs", "1", "--precision", "fp32", "--batch-size", "9"]


def started(places, output):
    return ["sweep", "--data", places / "rows.csv", "--model", places / "base", *PLAIN, "--output", output]


@pytest.fixture(scope="module")
def swept(places, tmp_path_factory, finished):
    """A finished sweep of three points, and what was said."""
    folder = tmp_path_factory.mktemp("swept") / "rates"
    words = [*started(places, folder), "--together", "2", "--grid", "learning_rate=1e-3,1e-2,1e30", "r=3"]
    return folder, finished(*words)


def test_a_sweep_is_run_folders_a_table_and_a_page(swept, afina, places):
    folder, said = swept
    assert "learning_rate: 1e-3, 1e-2, 1e30" in said
    assert "points 1 to 2: together, in one pass a step" in said
    assert "point 3: one after another (no other is left to share a pass with)" in said
    assert "point 3 (learning_rate=1e30 r=3) failed: the loss is" in said
    assert "the test rows choose nothing" in said
    assert [p.name for p in sorted(folder.iterdir())] == ["01", "02", "03", "report.html", "sweep.json"]
    for name in ("recipe.yaml", "metrics.json", "log.jsonl", "predictions.csv", "report.html", "adapter"):
        assert (folder / "02" / name).exists()
    scores = {n: json.loads((folder / n / "metrics.json").read_text())["validation"]["macro_f1"] for n in ("01", "02")}
    best = "01" if scores["01"] > scores["02"] else "02"
    page = (folder / "report.html").read_text()
    assert f'href="{best}/report.html"' in page
    assert "http" not in page.replace("http-equiv", "")
    answered = afina("predict", folder / best, "--text", "amber river")
    assert answered.code == 0, answered.err
    checked = afina("check", folder / "02" / "recipe.yaml")
    assert checked.code == 0, checked.err
    assert "0.01 at its peak" in checked.out


def test_collecting_trains_nothing(swept, afina):
    folder, _ = swept
    before = (folder / "01" / "metrics.json").stat().st_mtime_ns
    found = afina("sweep", "--collect", "--output", folder)
    assert found.code == 0
    assert "Points, by what the validation rows say" in found.out
    assert "failed the loss is" in found.out
    assert (folder / "01" / "metrics.json").stat().st_mtime_ns == before


def test_finished_points_are_not_trained_again(swept, places, afina, tmp_path):
    folder = tmp_path / "rates"
    shutil.copytree(swept[0], folder)
    shutil.rmtree(folder / "01")
    before = (folder / "02" / "metrics.json").stat().st_mtime_ns
    words = [*started(places, folder), "--grid", "learning_rate=1e-3,1e-2,1e30", "r=3"]
    refused = afina(*words)
    assert refused.code == 1
    assert "to finish the sweep in it add --resume" in refused.err
    done = afina(*words, "--resume", "--array", "1/3")
    assert done.code == 0, done.err
    assert "3 points, 1 of them in this part" in done.out
    assert (folder / "01" / "metrics.json").is_file()
    assert (folder / "02" / "metrics.json").stat().st_mtime_ns == before
    other = afina(*started(places, folder), "--grid", "learning_rate=1e-3,2e-2", "--resume")
    assert "holds another sweep, of 3 points" in other.err
    longer = afina(*words, "--epochs", "3", "--resume")
    assert longer.code == 1
    assert "holds a sweep of another recipe: training.epochs was 1 and is 3. Type what it was started with" in longer.err


def test_everything_wrong_with_a_grid_is_told_together(places, afina, tmp_path):
    said = afina(*started(places, tmp_path / "x"), "--grid", "learning_rat=1,2", "r=8,,16", "lora_alpha=4", "lora_alpha=8",
                 "seed=1,1", "--array", "5/4")  # fmt: skip
    assert said.code == 1
    for words in (
        "'learning_rat' is no key of a recipe and no option of lora. Did you mean 'learning_rate'",
        "r=8,,16: a value is empty",
        "lora_alpha is given twice", "seed=1,1: 1 comes twice", "--array 5/4: expected K/N",
    ):  # fmt: skip
        assert words in said.err
    for word in ("learning_rat=1,2", "r=8,", "r", "seed=1,1"):
        refused = afina(*started(places, tmp_path / "x"), "--grid", word)
        assert refused.code == 1
        assert "the grid is empty" not in refused.err
    empty = afina(*started(places, tmp_path / "x"), "--grid", "r=8")
    assert "the grid is empty" in empty.err
    same = afina(*started(places, tmp_path / "x"), "--grid", "learning_rate=1e-3,0.001")
    assert "points 1 and 2 are the same" in same.err
    wrong = afina(*started(places, tmp_path / "x"), "--grid", "r=0,4", "learning_rate=1e-3,fast")
    assert "learning_rate=fast: expected a number" in wrong.err
    low = afina(*started(places, tmp_path / "x"), "--grid", "r=0,4")
    assert "point 1 (r=0)" in low.err
    assert not (tmp_path / "x").exists()


def test_lists_are_single_values_and_seeds_divide_the_rows(places, afina, tmp_path):
    words = [*started(places, tmp_path / "x"), "--grid", "target_modules=[query,value],all-linear", "seed=0,1", "--dry-run"]
    said = afina(*words)
    assert said.code == 0, said.err
    assert "4 points" in said.out
    assert "the points divide the rows in 2 ways (the seed divides them too)" in said.out
    some = afina(*words, "--random", "3")
    assert "3 points" in some.out
    assert not (tmp_path / "x").exists()


def test_parts_of_a_slurm_array(places, afina, tmp_path, monkeypatch):
    from afina.cli.sweep import _share
    from afina.errors import Problems

    for name, value in (("ID", "7"), ("MIN", "5"), ("COUNT", "4")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert _share("slurm", Problems("")) == (3, 4)
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT")
    assert "are not set" in afina(*started(places, tmp_path / "x"), "--grid", "r=1,2", "--array", "slurm").err


def test_a_cluster_that_is_not_reached_leaves_no_folder(places, afina, tmp_path):
    said = afina(*started(places, tmp_path / "x"), "--grid", "r=1,2", "--ray", "127.0.0.1:1")
    assert said.code == 1
    assert "--ray" in said.err
    assert not (tmp_path / "x").exists()


def test_a_sweep_on_ray(places, afina, tmp_path):
    pytest.importorskip("ray")
    words = [*started(places, tmp_path / "x"), "--grid", "learning_rate=1e-3,1e-2", "--ray", "local", "--parts", "2"]
    done = afina(*words)
    assert done.code == 0, done.err
    assert "part 2 of 2 is finished" in done.out
    assert (tmp_path / "x" / "02" / "metrics.json").is_file()
    assert (tmp_path / "x" / "report.html").is_file()
