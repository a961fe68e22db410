"""Bases that are quantised as they are loaded: what is quantised, what stays, what it takes, and whole runs on them."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))

import language_bases
from every_task import CASES, case

from afina.core.codecs import codec_of, stored_bytes
from afina.core.dequantise import dequantised
from afina.core.registry import methods
from afina.errors import ConfigError, MissingDependencyError
from afina.memory.loading import floating
from afina.memory.storage import QUANTISED, Storage, settled_weights, stored_as
from afina.training.recipe import MemoryOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun

LIBRARY = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8_weight_only": "torchao"}
ERROR = {"int8": 0.02, "nf4": 0.15, "fp4": 0.2, "int8_weight_only": 0.02}
AUTO = {"T5": tf.AutoModelForSeq2SeqLM, "BART": tf.AutoModelForSeq2SeqLM}


def auto_of(architecture):
    return AUTO.get(architecture, tf.AutoModelForCausalLM)


@pytest.fixture(params=QUANTISED)
def storage(request):
    pytest.importorskip(LIBRARY[request.param], reason=f"{LIBRARY[request.param]} is not installed")
    return request.param


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(architecture):
        if architecture not in made:
            made[architecture] = str(language_bases.save(tmp_path_factory.mktemp(architecture), architecture))
        return made[architecture]

    return base


PAIRS = [(a, w) for a in sorted(language_bases.MODELS) for w in QUANTISED if w == "nf4" or a in ("GPT-2", "T5")]


@pytest.mark.parametrize(("architecture", "storage"), PAIRS, indirect=["storage"])
def test_linear_layers_are_quantised_and_all_else_is_as_it_was(architecture, storage, bases):
    auto, path = auto_of(architecture), bases(architecture)
    plain = auto.from_pretrained(path)
    model, info = Storage(storage).load(auto, path)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    kept, quantised, own = set(floating(plain)), 0, dict(plain.named_modules())
    turned = {"Conv1D"} if storage != "int8_weight_only" else set()  # torchao knows nn.Linear alone
    for name, module in model.named_modules():
        before = own[name]
        if type(before).__name__ in {"Linear"} | turned and name not in kept:
            read = codec_of(module).read(module).float()
            weight = before.weight.T if type(before).__name__ == "Conv1D" else before.weight
            assert read.shape == weight.shape
            assert float((read - weight).detach().norm() / weight.detach().norm()) < ERROR[storage], name
            assert not codec_of(module).exact
            quantised += 1
        elif "weight" in module._parameters:
            assert torch.equal(module.weight, before.weight), name
    assert quantised or storage == "int8_weight_only"
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype == torch.float32
    batch = {"input_ids": torch.arange(5, 28)[None] % 97}
    batch |= {"decoder_input_ids": batch["input_ids"][:, :11]} if auto is tf.AutoModelForSeq2SeqLM else {}
    with torch.no_grad():
        first = model(**batch).logits
        second = model(**batch).logits  # an eval pass leaves nothing behind (T43)
        assert torch.equal(first, second)
        assert torch.allclose(dequantised(model)(**batch).logits, first, rtol=1e-3, atol=1e-3)


# in a process of its own: the heap of one in which models were trained has holes
_LOADING = """
import sys
import torch
import transformers as tf
from afina.core.codecs import stored_bytes
from afina.memory.heap import large_tensors_apart
from afina.memory.measure import measured
from afina.memory.storage import Storage
storage, folder = sys.argv[1:]
large_tensors_apart()  # as a run does before it loads
Storage(storage).load(tf.AutoModelForCausalLM, f"{folder}/small")  # libraries are loaded before it is measured
with measured(torch.device("cpu")) as peak:
    model, _ = Storage(storage).load(tf.AutoModelForCausalLM, folder)
print(stored_bytes(model), peak.added)
"""


def test_what_is_held_while_loading_is_what_stays_and_little_more(storage, tmp_path):
    """The whole model in floating point is never there; tensors are read one by one."""
    config = tf.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=997, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        outline = tf.LlamaForCausalLM(config)
    sizes = [4 * math.prod(p.shape) for p in outline.parameters()]
    assert sum(sizes) > 115e6
    model = outline.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    model.save_pretrained(tmp_path, max_shard_size="40MB")
    del model, outline
    small = tf.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=37)
    tf.LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    command = [sys.executable, "-c", _LOADING, storage, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    held, added = map(int, done.stdout.split()[-2:])
    assert held < (0.35 if "int8" in storage else 0.2) * sum(sizes)
    assert added < held + 8 * max(sizes) + 44e6  # the workspace of quantising one tensor, and what is read in between
    assert added < 0.9 * sum(sizes)  # mapped as a whole, the checkpoint alone is all of it


def test_t33_what_is_not_quantised_keeps_the_type_of_the_checkpoint(storage, tmp_path):
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=997,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    chosen = Storage.of(storage, tf.AutoConfig.from_pretrained(tmp_path))
    model, _ = chosen.load(tf.AutoModelForSequenceClassification, str(tmp_path), num_labels=3)
    assert chosen.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert type(model.score) is torch.nn.Linear
    whole = sum(2 * p.numel() for p in tf.AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    assert stored_bytes(model) < 0.85 * whole
    with chosen.arithmetic(torch.device("cpu")), torch.no_grad():
        model(torch.arange(7)[None])


def test_a_checkpoint_that_was_quantised_before_is_taken_as_it_is(storage, bases, tmp_path):
    first, _ = Storage(storage).load(tf.AutoModelForCausalLM, bases("Llama"))
    if storage != "int8_weight_only":
        for module in first.modules():  # saved by transformers, which knows bitsandbytes' own layers
            if type(module).__name__.startswith("Lean"):
                module.__class__ = type(module).__mro__[1]
    first.save_pretrained(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path)
    assert stored_as(config) == storage
    assert settled_weights("auto", config, "fp32") == storage
    other = "nf4" if storage != "nf4" else "int8"
    with pytest.raises(ConfigError, match=f"memory.weights={other}: the checkpoint is stored as {storage}"):
        settled_weights(other, config, "fp32")
    again, _ = Storage(storage).load(tf.AutoModelForCausalLM, str(tmp_path))
    for one, two in zip(first.modules(), again.modules(), strict=True):
        if not codec_of(one).exact and "weight" in one._parameters:
            assert torch.equal(codec_of(one).read(one), codec_of(two).read(two))
            assert codec_of(two).name == codec_of(one).name


def test_a_checkpoint_of_an_unknown_quantisation_is_refused():
    config = tf.LlamaConfig(quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ConfigError, match="the checkpoint is quantised by aqlm"):
        settled_weights("auto", config, "fp32")


@pytest.mark.parametrize("weights", ["gptq", "awq", "hqq"])
def test_what_needs_data_to_quantise_by_is_not_made(weights):
    with pytest.raises(ConfigError, match=f"memory.weights={weights}: the checkpoint is not quantised so"):
        settled_weights(weights, tf.LlamaConfig(), "fp32")


def test_a_missing_library_is_told_before_anything_is_read(storage, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    command = rf"memory.weights={storage} needs {LIBRARY[storage]}.*pip install 'afina\[{LIBRARY[storage]}\]'"
    with pytest.raises(MissingDependencyError, match=command):
        Storage(storage).load(tf.AutoModelForCausalLM, str(tmp_path / "nowhere"))
    recipe = case("sequence_classification", tmp_path)
    recipe.memory = MemoryOptions(weights=storage)
    with pytest.raises(ConfigError, match=command):
        prepare(recipe, tmp_path / "run")


def whole_run(recipe, folder):
    """Trained, tested, saved, read back and loaded to answer: the same answers everywhere."""
    run = prepare(recipe, folder)
    done = run.execute()
    assert done["read_back"]["largest_difference"] < 1e-4
    assert f"weights: {recipe.memory.weights}" in (folder / "recipe.yaml").read_text()
    loaded = TrainedRun.load(folder)
    storages = {codec_of(m).name for m in loaded.model.modules() if "weight" in m._parameters}
    assert len(storages - {"plain", "opaque"}) == 1
    assert loaded.task.storage == run.task.storage
    return done


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_task_trains_on_four_bits(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    recipe = case(name, tmp_path, epochs=1)
    recipe.memory = MemoryOptions(weights="nf4")
    whole_run(recipe, tmp_path / "run")


def test_a_run_in_every_storage(storage, tmp_path):
    recipe = case("sequence_classification", tmp_path)
    recipe.memory = MemoryOptions(weights=storage)
    recipe.training.precision = "bf16"
    whole_run(recipe, tmp_path / "run")


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_trains_on_eight_bits(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    recipe = case("sequence_classification", tmp_path, epochs=1)
    recipe.memory, recipe.method = MemoryOptions(weights="int8"), {"name": method}
    if method == "trainable_tokens":
        recipe.method["token_indices"] = [5, 6, 7]
    whole_run(recipe, tmp_path / "run")
