"""Plans: parts that follow the settings, bytes that real storages and optimizers have, and steps that were measured."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))

import language_bases

from afina.core.codecs import codec_of, stored_bytes
from afina.errors import ConfigError
from afina.memory.loading import load_quantised
from afina.memory.outlines import outlined
from afina.training.plan import planner_for
from afina.training.recipe import DistributedOptions, MemoryOptions, Recipe, TrainingOptions
from afina.training.within_limit import settle, within_limit

BERT = tf.BertConfig(vocab_size=101, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1021)
LLAMA = tf.LlamaConfig(
    vocab_size=997, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=320,
    num_key_value_heads=2, bos_token_id=None, eos_token_id=3,
)  # fmt: skip

SHORT = tf.LlamaConfig(**{**LLAMA.to_diff_dict(), "num_hidden_layers": 1})


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """Folders that hold a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("plans")
    for name, config in (("bert", BERT), ("llama", LLAMA), ("short", SHORT)):
        config.save_pretrained(folder / name)
    return folder


def recipe_of(model, *, task="sequence_classification", method=None, distributed=None, memory=None, **training):
    return Recipe(
        model=str(model), task={"name": task}, method=method or {"name": "lora"}, memory=MemoryOptions(**(memory or {})),
        distributed=DistributedOptions(**(distributed or {})),
        training=TrainingOptions(**{"max_length": 61, "batch_size": 8, "precision": "fp32", **training}),
    )  # fmt: skip


def planned(recipe, device="cpu", **settings):
    return planner_for(recipe, device, **settings).plan(recipe)


def test_a_plan_needs_no_weights_and_follows_the_settings(configured):
    def parts(**changes):
        recipe = recipe_of(configured / "llama", task="causal_lm", **changes)
        return planned(recipe).moments["train"].device

    plain = parts()
    assert plain["weights fp32"] >= 4 * 997 * 128
    assert plain["optimizer"] == pytest.approx(2 * plain["adapters"], rel=0.01)
    assert plain["copies"] == 2 * plain["adapters"]
    less = parts(gradient_accumulation=8)
    assert less["gradients"] == less["adapters"]
    assert less["activations"] < plain["activations"] / 6
    again = parts(memory={"gradient_checkpointing": True})
    assert again["activations"] < 0.6 * plain["activations"]  # of three blocks one is there in full
    limited = parts(memory={"limit": "100GB"})  # what can be computed again is kept only where memory is plenty
    assert limited["activations"] < 0.95 * plain["activations"]
    int8 = parts(memory={"weights": "int8"})
    assert int8["weights int8"] < 0.3 * (plain["weights fp32"] - 2 * 4 * 997 * 128)
    assert parts(optimizer="sgd")["optimizer"] == plain["adapters"]


@pytest.mark.parametrize("setting", ["fp32", "bf16"])
def test_a_step_takes_what_was_planned(configured, setting):
    """Resident memory of a step, in a process of its own, against its plan; the whole table is made by
    benchmarks/memory_plan.py."""
    said = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plan_worker.py")), str(configured / "bert"), setting],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    expected, measured = map(int, said.stdout.split()[-2:])
    assert expected == pytest.approx(measured, rel=0.15)


def test_blocks_computed_once_are_planned_with_all_rows_read_at_once_and_lie_on_the_disk(configured):
    def plan(**options):
        method = {"name": "last_layers", "num_layers": 1}
        return planned(recipe_of(configured / "bert", method=method, batch_size=1, evaluation_batch_size=64, **options))

    once, each, kept = plan(), plan(trunk_cache="off"), plan(frozen_dropout="keep")
    assert "the first 3 of 4 blocks are frozen and computed once a row" in once.disk
    assert "on the disk (up to 4GB)" in once.disk
    assert "computed in every step (training.trunk_cache=off)" in each.disk
    assert kept.disk == ""
    work = [p.moments["train"].device["workspace"] for p in (once, each)]
    assert work[0] > 64 * 61 * 1021 * 4 > 5 * work[1]  # what is between the two layers of a block


@pytest.mark.parametrize("kind", ["int8", "nf4", "int8_weight_only"])
def test_outlines_store_what_loading_stores(tmp_path, kind):
    library = "torchao" if kind == "int8_weight_only" else "bitsandbytes"
    pytest.importorskip(library, reason=f"{library} is not installed")
    language_bases.save(tmp_path, "Llama")
    with torch.device("meta"):
        empty = outlined(tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(tmp_path)), kind)
    real, _ = load_quantised(tf.AutoModelForCausalLM, str(tmp_path), kind, torch.float32)
    names = [{n for n, m in model.named_modules() if codec_of(m).name not in ("plain", "opaque")} for model in (empty, real)]
    assert names[0]
    assert names[0] == names[1]
    bytes_of = sum(t.numel() * t.element_size() for t in [*{*empty.parameters()}, *empty.buffers()])
    tables = 64 * len(names[0])  # bitsandbytes keeps the sixteen values of nf4 beside each weight
    assert stored_bytes(real) - tables - 512 <= bytes_of <= stored_bytes(real) + 512


def test_an_8_bit_state_is_as_large_as_the_real_one(configured):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    recipe = recipe_of(configured / "llama", task="causal_lm", method={"name": "lora", "r": 67}, optimizer="adamw_8bit")
    found = planned(recipe).moments["train"].device["optimizer"]
    model, _ = planner_for(recipe, "cpu").adapted("fp32")
    trained = [torch.nn.Parameter(torch.zeros(p.shape)) for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for k, t in state.items() if "qmap" not in k and hasattr(t, "nbytes")]
    assert found == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)


def test_a_gpu_is_planned_without_one(configured):
    recipe = recipe_of(configured / "llama", task="causal_lm", precision="bf16")
    plan = planned(recipe, "cuda")
    assert plan.moments["train"].device["CUDA context and kernels"] > 4e8
    assert plan.moments["load"].host["weights fp32"] == plan.moments["train"].device["weights fp32"]
    assert plan.to_dict()["bytes"] == plan.total


def test_engines_divide_what_they_divide(configured):
    def plan(**distributed):
        recipe = recipe_of(configured / "llama", task="causal_lm", distributed=distributed, precision="bf16")
        return planned(recipe, "cuda", processes=2).moments["train"]

    whole, two, three = plan(engine="ddp"), plan(engine="zero2"), plan(engine="zero3", offload=True)
    assert whole.device["exchange"] == whole.device["adapters"]
    assert two.device["optimizer"] == pytest.approx(whole.device["optimizer"] / 2, rel=0.01)
    assert two.device["weights fp32"] == whole.device["weights fp32"]
    assert three.host["weights fp32"] == pytest.approx(whole.device["weights fp32"] / 2, rel=0.01)
    assert "weights fp32" not in three.device
    assert 0 < three.device["gathered"] <= whole.device["weights fp32"]


def test_the_cheapest_settings_that_fit_are_found_in_order(configured):
    recipe = recipe_of(configured / "short", task="causal_lm", precision="bf16", memory={"limit": "100GB"})
    planner = replace(planner_for(recipe, "cpu"), process=0)
    start = planner.plan(recipe).total
    assert within_limit(planner, recipe).changed == {}

    recipe.memory.limit = f"{start / 1e6:.3f}MB"  # less a tenth
    parts = within_limit(planner, recipe)
    assert parts.fits
    assert set(parts.changed) <= {"training.gradient_accumulation", "training.evaluation_batch_size"}

    small = parts.tried[1].footprint.total  # of one row at a time
    recipe.memory.limit = f"{small / 1e6:.3f}MB"
    tight = within_limit(planner, recipe)
    added = [t.added for t in tight.tried]
    assert added[2].startswith("+ blocks computed again")
    assert tight.footprint.total <= 0.9 * small
    before = recipe.training.batch_size
    settle(planner, recipe)
    assert recipe.training.batch_size == before
    assert planner.plan(recipe).total == tight.footprint.total

    recipe.memory.limit = "1MB"
    with pytest.raises(ConfigError, match=r"nothing fits into .* the least is .* most of it"):
        settle(planner, recipe)


def test_length_and_model_have_to_be_known(configured, tmp_path):
    with pytest.raises(ConfigError, match=r"training\.max_length is missing"):
        planner_for(recipe_of(configured / "bert", max_length=None), "cpu")
    with pytest.raises(ConfigError, match=r"folder without a config\.json"):
        planner_for(recipe_of(tmp_path), "cpu")
    with pytest.raises(ConfigError, match="takes at most 512"):
        planner_for(recipe_of(configured / "bert", max_length=513), "cpu")


@pytest.mark.parametrize("method", ["prefix_tuning", "dora", "ia3", "bottleneck"])
def test_methods_are_planned_as_they_compute(configured, method):
    if importlib.util.find_spec(f"afina.methods.{method}") is None:
        pytest.fail(f"there is no method {method}")
    recipe = recipe_of(configured / "llama", task="causal_lm", method={"name": method}, batch_size=2)
    parts = planned(recipe).moments["train"].device
    model, _ = planner_for(recipe, "cpu").adapted("fp32")
    assert parts["adapters"] == sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["reward", "dpo", "orpo", "kto", "grpo"])
def test_preferences_are_planned_with_one_copy_of_the_base(name, configured):
    """Twice the rows of a task with one answer a row, `group` times for answers that are written, and never another base."""

    def parts(task, **options):
        recipe = recipe_of(configured / "llama", task=task, max_length=48, batch_size=2)
        recipe.task |= options
        return planned(recipe).moments

    written = {"max_new_tokens": 13} if name == "grpo" else {}
    one, made = parts("causal_lm"), parts(name, **written)
    weights = lambda moments: sum(v for k, v in moments["train"].device.items() if k.startswith("weights"))
    assert weights(made) <= weights(one)
    times = {"reward": 2, "dpo": 2, "orpo": 2, "kto": 1, "grpo": 8 * 61 / 48}[name]
    share = made["train"].device["activations"] / one["train"].device["activations"]
    assert 0.75 * times < share < 1.35 * times, share
    assert made["evaluate"].device
