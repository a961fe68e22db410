"""From a CSV file to answers, through the commands a person types."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from afina.cli.assignments import PLACES


@pytest.fixture(scope="module")
def done(places, tmp_path_factory):
    """A run made by the command in a process of its own, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "first"
    words = [
        "train", "--data", str(places / "rows.csv"), "--text", "message", "--label", "label",
        "--model", str(places / "base"), "--output", str(output), "--epochs", "3", "--learning-rate", "1e-2",
        "r=3", "target_modules=query,value",
    ]  # fmt: skip
    code = f"import sys; sys.argv = {['afina', *words]!r}; from afina.cli.main import main; main()"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return output, said


def test_training_shows_what_it_does_and_nothing_else(done):
    output, said = done
    assert said.stderr == ""
    for part in (
        "4 adapted", "trained whole (classifier)", "frozen", "parameters", "97 rows, 97 used", "validation", "complaint",
        "[CLS]", "cut off at", "epoch 3", "Test: ", "words counted", "precision", "compared", str(output / "adapter"),
    ):  # fmt: skip
        assert part in said.stdout, part
    assert max(map(len, said.stdout.splitlines())) < 240


def test_predict_in_a_new_process_prints_every_probability(done):
    output, _ = done
    words = ["afina", "predict", str(output), "--text", "w1 late", "--text", "hello w3 w5"]
    code = f"import sys; sys.argv = {words!r}; from afina.cli.main import main; main()"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stderr == ""
    lines = said.stdout.splitlines()
    assert lines[0].split() == ["answer", "complaint", "other", "text"]
    assert [line.split("  ")[-1].strip() for line in lines[1:]] == ["w1 late", "hello w3 w5"]
    assert all(line.count("%") == 2 for line in lines[1:])


def test_predict_json_and_file_agree(afina, done, places, tmp_path):
    output, _ = done
    source = tmp_path / "new.csv"
    source.write_text("id;message\n1;w1 late\n2;  \n3;hello, w3\n", encoding="utf-8")
    answers = [json.loads(line) for line in afina("predict", output, "--data", source, "--json").out.splitlines()]
    assert answers[1]["label"] is None
    for answer in (answers[0], answers[2]):
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
    said = afina("predict", output, "--data", source, "--output", tmp_path / "out.csv")
    assert said.code == 0
    assert "1 empty text" in said.err
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert [row["answer"] or None for row in rows] == [a["label"] for a in answers]
    assert float(rows[0]["p(other)"]) == pytest.approx(answers[0]["probabilities"]["other"], abs=1e-6)
    said = afina("predict", output, "--data", source, "--output", tmp_path / "out.csv", "--column", "mesage")
    assert said.code == 1
    assert "exists" in said.err
    said = afina("predict", output, "--data", source, "--json", "--column", "mesage")
    assert "'message'" in said.err


def test_evaluate_repeats_the_test_figures(afina, done, tmp_path):
    output, _ = done
    stored = json.loads((output / "metrics.json").read_text())["test"]
    again = json.loads(afina("evaluate", output, "--json").out)
    assert again["confusion"] == stored["confusion"]
    assert again["accuracy"] == stored["accuracy"]
    other = tmp_path / "rows.csv"
    other.write_text("message,label\nw1 late,Complaint\nhello,strange\n", encoding="utf-8")
    assert "strange" in afina("evaluate", output, "--data", other).err


def test_a_recipe_with_options_typed_over_it(afina, done, tmp_path):
    output, _ = done
    said = afina("train", output / "recipe.yaml", "--output", tmp_path / "again", "--epochs", 1, "r=5", "--dry-run")
    assert said.code == 0, said.err
    assert "r=5" in said.out
    assert "1 of " in said.out
    assert "nothing" in said.out.lower()
    assert not (tmp_path / "again").exists()


def test_resume_without_checkpoint_and_overwrite(afina, done, places, tmp_path):
    output, _ = done
    assert "--resume" in afina("train", output / "recipe.yaml", "--output", tmp_path / "none", "--resume").err
    said = afina("train", output / "recipe.yaml", "--output", output)
    assert "--overwrite" in said.err
    said = afina("train", "--resume", "--output", output, "--epochs", 4)
    assert said.code == 0, said.err
    assert "epoch 4  loss" in said.out
    assert "epoch 3  loss" not in said.out


def test_every_option_says_its_default_as_the_recipe_has_it():
    """The help of the command line and the recipe's defaults cannot drift apart."""
    import inspect
    import typing

    from afina.cli.train import train
    from afina.training.recipe import Recipe

    recipe = Recipe()
    for name, annotation in typing.get_type_hints(train, include_extras=True).items():
        if name in PLACES and name not in ("data", "text", "image", "audio", "text_pair", "label", "reward"):
            text = typing.get_args(annotation)[1].help
            said = text[text.rindex("(default: ") + len("(default: ") : -1]
            section, _, key = PLACES[name].rpartition(".")
            holder = getattr(recipe, section) if section else recipe
            default = holder["name"] if isinstance(holder, dict) else getattr(holder, key)
            assert default is None or said == f"{default}", name
    assert set(PLACES) <= set(inspect.signature(train).parameters)


def test_a_second_text_is_refused_where_none_was_trained(done, afina):
    said = afina("predict", done[0], "--text", "w1 late", "--text-pair", "w2")
    assert said.code == 1
    assert "--text-pair: this run was trained on single texts" in said.err
