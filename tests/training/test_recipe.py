"""Recipes: read back as written, everything wrong named at once, options as they were typed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from afina.core.registry import methods
from afina.errors import ConfigError, Problems
from afina.training.models import find_model
from afina.training.recipe import DataOptions, Recipe, TrainingOptions, parse_value, read_recipe

NEEDED = {"num_virtual_tokens": 3, "token_indices": [1, 2]}


def resolved(name="lora", **options):
    recipe = Recipe()
    recipe.method = {"name": name, **options}
    problems = Problems("recipe")
    config = recipe.check(problems)
    problems.raise_as(ConfigError)
    recipe.resolve_method(config)
    return recipe


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_resolved_recipe_reads_back_and_means_the_same(name, tmp_path):
    fields = {f.name for f in dataclasses.fields(methods()[name].config)}
    recipe = resolved(name, **{k: v for k, v in NEEDED.items() if k in fields})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = read_recipe(path)
    assert dataclasses.asdict(again) == dataclasses.asdict(recipe)
    config = again.check(Problems("again"))
    assert config == recipe.check(Problems("first"))
    assert type(config) is methods()[name].config


def test_everything_wrong_is_said_at_once(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("modle: x\ndata: rows.csv\ntraining: {epochs: many, batchsize: 3}\nmethod: {r: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_recipe(path)
    text = str(error.value)
    for said in (
        "'model'",
        "data='rows.csv'",
        "training.epochs='many': expected a whole number",
        "'batch_size'",
        "method: ",
    ):
        assert said in text


def test_limits_and_unknown_options_together():
    recipe = Recipe()
    recipe.training.epochs, recipe.training.precision = 0, "bf61"
    recipe.method = {"name": "lora", "rnk": 3}
    problems = Problems("recipe")
    recipe.check(problems, spell=lambda place: f"<{place}>")
    text = "\n".join(problems.found)
    assert "<training.epochs>=0" in text
    assert "'bf16'" in text
    assert "<method.rnk> is no option of lora. Did you mean" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_may_be_other_than_finite(value):
    """No comparison finds a NaN, so no limit does."""
    recipe, asked = Recipe(), []
    for section in ("training", "data", "data.clean"):
        options = recipe.data.clean if section == "data.clean" else getattr(recipe, section)
        for f in dataclasses.fields(options):
            if str(f.type).startswith("float"):
                setattr(options, f.name, value)
                asked.append(f"{section}.{f.name}")
    problems = Problems("recipe")
    recipe.check(problems)
    assert len(asked) > 7
    for name in asked:
        assert f"{name}={value}: expected a finite number" in problems.found
    for method in methods().values():
        needed = {k: v for k, v in NEEDED.items() if k in {f.name for f in dataclasses.fields(method.config)}}
        for f in dataclasses.fields(method.config):
            if str(f.type) == "float":
                with pytest.raises(ConfigError, match=f"{f.name}={value}: expected a finite number"):
                    method.make_config(**needed, **{f.name: value})


def test_what_python_gives_is_read_as_what_a_file_gives():
    training = TrainingOptions(epochs="many", warmup="0.2")
    recipe = Recipe(data=DataOptions(label=None, text=7), training=training, memory=None)
    problems = Problems("recipe")
    recipe.check(problems)
    assert problems.found == [
        "data.label=None: expected text",
        "training.epochs='many': expected a whole number",
        "memory=None: expected MemoryOptions(...)",
    ]
    assert (recipe.data.text, recipe.training.warmup) == ("7", 0.2)


@pytest.mark.parametrize(
    ("text", "hint", "several", "value"),
    [
        ("16", int, False, 16),
        ("1e-3", float, False, 1e-3),
        ("3", float | None, False, 3.0),
        ("none", float | None, False, None),
        ("true", bool, False, True),
        ("gaussian", Any, False, "gaussian"),
        ("all-linear", Any, True, "all-linear"),
        ("query", Any, True, ["query"]),
        ("query,value.dense", Any, True, ["query", "value.dense"]),
        (".*query", Any, True, ".*query"),
        ("[query, value]", Any, True, ["query", "value"]),
        ("0,1", Any, True, [0, 1]),
        ("7", Any, True, [7]),
        ("{query: 4}", dict[str, int], False, {"query": 4}),
        ("12", str, False, "12"),
    ],
)
def test_values_as_typed(text, hint, several, value):
    got = parse_value(text, hint, several=several)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"), [("abc", int), ("1.5", int), ("true", int), ("yes?", bool), ("x", float), ("3", dict[str, int])]
)
def test_values_of_the_wrong_type(text, hint):
    with pytest.raises(ValueError, match="expected"):
        parse_value(text, hint)


def test_models_by_name(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"without a config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        find_model(str(tmp_path / "none"))
    assert find_model("someone/some-model").path == "someone/some-model"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'afina\[demo\]'"):
        find_model("minilm")


def test_on_and_off_may_be_written_in_a_file_as_on_the_command_line(tmp_path):
    """YAML takes them for true and false."""
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {packing: on, frozen_dropout: off, trunk_cache: off}\nmemory: {gradient_checkpointing: on}")
    recipe = read_recipe(path)
    options = recipe.training
    assert (options.packing, options.frozen_dropout, options.trunk_cache) == ("on", "off", "off")
    assert recipe.memory.gradient_checkpointing is True
