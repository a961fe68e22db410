"""`afina check` shows what a run would do and does none of it; `afina tasks` says what the tasks say of themselves."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from afina.tasks.catalogue import tasks


def recipe(places, folder, **changed):
    content = {
        "model": str(places / "base"),
        "data": {"file": str(places / "rows.csv"), "text": "message", "label": "label"},
        "method": {"name": "lora", "r": 3},
        **changed,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_check_shows_everything_and_writes_nothing(afina, places, tmp_path):
    path = recipe(places, tmp_path)
    before = sorted(p for p in [*places.rglob("*"), *tmp_path.rglob("*")])
    said = afina("check", path, "training.epochs=7", "training.batch-size=11", "r=5", "data.test=0.31")
    assert said.code == 0, said.err
    for part in ("97 rows", "r=5", "7 of ", "11 rows a step", "[CLS]", "adapted", "complaint", "Nothing was trained"):
        assert part in said.out, part
    assert "test" in said.out
    assert sorted(p for p in [*places.rglob("*"), *tmp_path.rglob("*")]) == before


def test_check_tells_everything_that_is_wrong_at_once(afina, places, tmp_path):
    path = recipe(places, tmp_path, task="sequence_clasification", training={"best": "f1", "epochs": 0})
    said = afina("check", path)
    assert said.code == 1
    for part in ("is no task. Did you mean 'sequence_classification'", "epochs=0"):
        assert part in said.err, said.err
    said = afina("check", recipe(places, tmp_path, training={"best": "f1"}), "task.size=3", "data.tets=0.1")
    assert said.code == 1
    for part in ("training.best='f1': sequence_classification has no such figure", "task.size", "or 'test'"):
        assert part in said.err, said.err


def test_every_task_is_listed_with_its_figures(afina):
    said = afina("tasks").out
    for name, task in tasks().items():
        line = next(line for line in said.splitlines() if line.split()[:1] == [name])
        assert all(figure.title in line for figure in task.figures.values())


@pytest.mark.parametrize("name", sorted(tasks()))
def test_every_column_and_option_is_listed_with_its_help(afina, name):
    said, offered = afina("tasks", name).out, afina("train", "--help").out
    for role, column in tasks()[name].kind.columns.items():
        option = f"--{role.replace('_', '-')}"
        assert f"  {option if f' {option} ' in offered else f'data.{role}'} " in said  # as it can be typed
        assert column.help in said
    for field in dataclasses.fields(tasks()[name].Options):
        assert f"\n  {field.name} " in said
        assert field.metadata["help"] in said


def test_an_unknown_task(afina):
    said = afina("tasks", "regresion")
    assert said.code == 1
    assert "'regression'" in said.err


def test_every_key_of_a_recipe_may_be_typed_over_it(afina, places, tmp_path):
    path = recipe(places, tmp_path, model="nowhere/at/all", method={"name": "dora", "r": 2})
    said = afina("check", path, f"model={places / 'base'}", "method=lora", "method.r=7", "task=sequence_classification")
    assert said.code == 0, said.err
    assert "lora" in said.out
    assert "r=7" in said.out
    said = afina("check", path, "model=elsewhere/at/all", "task=regresion")
    assert "Did you mean 'regression'" in said.err


def test_a_recipe_that_is_not_there_is_told_with_its_neighbours(afina, places, tmp_path):
    recipe(places, tmp_path)
    said = afina("check", tmp_path / "recipes.yaml")
    assert said.code == 1
    assert "there is no recipe" in said.err
    assert "Did you mean 'recipe.yaml'" in said.err
