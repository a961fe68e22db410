"""`afina methods` says what the registry and the configurations say, and `afina targets` what would really happen."""

from __future__ import annotations

import dataclasses

import pytest
import transformers as tf

from afina import get_peft_model
from afina.core.registry import methods
from afina.training.recipe import NOT_IN_RECIPES


def test_every_method_is_listed_with_its_facts(afina):
    said = afina("methods")
    lines = {line.split()[0]: line for line in said.out.splitlines()[1:] if line.strip()}
    assert set(lines) == set(methods())
    for name, method in methods().items():
        for fact in (method.trains, method.cost, method.paper):
            assert fact in lines[name]


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_option_is_listed_with_its_help(afina, name):
    method = methods()[name]
    said = afina("methods", name).out
    for field in dataclasses.fields(method.config):
        if field.name not in NOT_IN_RECIPES and field.name not in method.options:
            assert f"\n  {field.name} " in said
            assert field.metadata["help"] in said


def test_an_unknown_method(afina):
    said = afina("methods", "lorra")
    assert said.code == 1
    assert "'lora'" in said.err


@pytest.mark.parametrize("method", ["lora r=3", "ia3", "last_layers num_layers=1", "prompt_tuning num_virtual_tokens=5"])
def test_targets_counts_what_a_real_model_has(afina, places, method):
    name, *options = method.split()
    said = afina("targets", "--model", places / "base", "--method", name, *options)
    assert said.code == 0, said.err
    values = {key: int(value) for key, value in (o.split("=") for o in options)}
    model = tf.AutoModelForSequenceClassification.from_config(tf.AutoConfig.from_pretrained(places / "base"))
    targets = {"target_modules": "all-linear"} if name == "lora" else {}
    trainable, total = get_peft_model(
        model, methods()[name].make_config(task_type="SEQ_CLS", **targets, **values)
    ).get_nb_trainable_parameters()
    assert f"{trainable:,} of {total:,} parameters" in said.out
    assert "classifier" in said.out
    assert "frozen" in said.out


def test_targets_says_everything_wrong(afina, places):
    said = afina("targets", "--model", places / "none", "--method", "lora", "--task", "SEQ_CSL", "r=many")
    assert said.code == 1
    for part in ("--model", "--task", "'SEQ_CLS'", "r=many"):
        assert part in said.err
    said = afina("targets", "--model", places / "base", "target_modules=quary")
    assert "'query'" in said.err
