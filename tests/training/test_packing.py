"""`training.packing`: a packed run learns what a padded one does, and what cannot be packed is refused by its name."""

from __future__ import annotations

import json
import random

import pytest
from language_bases import save
from test_loop import fitted

from afina.errors import ConfigError, Problems
from afina.training.loop import make_engine
from afina.training.packing import settle_packing, wants_packing
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare

WORDS = ["red", "fruit", "dog", "capital", "grows", "small", "quick", "seven", "sentence", "lazy", "answer", "fox"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    draw, path = random.Random(0), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = [" ".join(draw.choices(WORDS, k=draw.choice((1, 3, 9)))) + f" {i}" for i in range(67)]
    path.write_text("".join(json.dumps({"prompt": t, "completion": t[::-1]}) + "\n" for t in text))
    return str(path)


def prepared(architecture, rows, output, method=None, **options):
    options = {"epochs": 1, "batch_size": 11, "learning_rate": 5e-3, "precision": "fp32", **options}
    model = str(save(output / "base", architecture))
    recipe = Recipe(
        model=model, task={"name": "causal_lm"}, data=DataOptions(file=rows), method=method or {"name": "lora", "r": 3},
        training=TrainingOptions(**options),
    )  # fmt: skip
    return prepare(recipe, output / "run")


def settled(run):
    return settle_packing(run.model, run.task, run.rows, run.recipe.training, make_engine("fp32"))


def test_t26_a_packed_run_has_the_losses_of_a_padded_one(rows, tmp_path):
    lines: dict[str, list[float]] = {"off": [], "on": []}
    for packing in lines:
        run = prepared("Llama", rows, tmp_path / packing, packing=packing, gradient_accumulation=2)
        notes = settled(run)
        assert run.task.packed == (packing == "on") == any("none sees another" in note for note in notes)
        fitted(run, lambda line, where=packing: lines[where].append(line["loss"]) if "loss" in line else None)
    assert lines["on"] == pytest.approx(lines["off"], rel=1e-4)
    assert lines["on"][-1] < lines["on"][0]


def test_t26_packing_is_refused_where_rows_see_each_other(rows, tmp_path):
    run = prepared("OPT", rows, tmp_path, packing="on")
    with pytest.raises(ConfigError, match=r"packing=on: rows cannot be packed here \(OPTForCausalLM: .*\); leave it out"):
        settled(run)
    assert not run.task.packed


def test_auto_packs_where_the_attention_takes_rows_of_any_length(rows, tmp_path):
    run = prepared("Llama", rows, tmp_path)
    assert run.recipe.training.packing == "auto"
    assert not wants_packing(run.model, run.task, run.recipe.training)
    config = run.model.get_base_model().config
    config._attn_implementation_internal = "flash_attention_2"
    assert wants_packing(run.model, run.task, run.recipe.training)


@pytest.mark.parametrize(
    ("task", "method", "said"),
    [
        ("sequence_classification", "lora", "packing=on: only rows of causal_lm are packed"),
        ("causal_lm", "prefix_tuning", "packing=on: prefix_tuning puts its tokens in front of each row"),
    ],
)
def test_what_is_never_packed_is_told_before_the_run(task, method, said):
    recipe, problems = Recipe(task={"name": task}, method={"name": method}), Problems("the recipe")
    recipe.training.packing = "on"
    recipe.check(problems)
    assert any(said in str(one) for one in problems.found)
