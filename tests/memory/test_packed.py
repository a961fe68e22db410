"""Checkpoints that GPTQ, AWQ and HQQ have quantised, as bases: read as their formats say, trained on, merged into."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))

import language_bases
from every_task import case

from afina import LoraConfig, get_peft_model
from afina.core.codecs import codec_of
from afina.core.codecs.packed import PackedLinear
from afina.core.merge_error import rounding
from afina.errors import ConfigError, MergeError
from afina.memory.storage import Storage, settled_weights, stored_as
from afina.training.recipe import MemoryOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun

GROUP = 8
FORMATS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "checkpoint_format": "gptq"},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "checkpoint_format": "gptq_v2"},
    "gptq8": {"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": GROUP, "axis": 1}}},
    "hqq8": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 8, "group_size": GROUP, "axis": 1}}},
}


def signed(value):
    return value - 2**32 if value >= 2**31 else value


def pack(rows, bits, order=None):
    """int32 words of lists of integers, written bit by bit."""
    each = 32 // bits
    order = order or range(each)

    def word(row, i):
        return signed(sum(row[i + place] << (bits * n) for n, place in enumerate(order)))

    return torch.tensor([[word(row, i) for i in range(0, len(row), each)] for row in rows], dtype=torch.int32)


def stored(name, weight):
    """Tensors of a layer in a format, and the weight `[out, in]` that they stand for."""
    said, (n_out, n_in) = FORMATS[name], weight.shape
    inner = said.get("quant_config", {}).get("weight_quant_params", {})
    bits = said.get("bits") or inner["nbits"]
    size = GROUP if said.get("group_size") != -1 else n_in
    most = 2**bits - 1
    if said["quant_method"] == "hqq":
        groups = weight.reshape(-1, size)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = ((high - low) / most).half()
        zero = (-low / scale.float()).half()
        q = (groups / scale.float() + zero.float()).round().clamp(0, most)
        value = ((q - zero.float()) * scale.float()).reshape(n_out, n_in)
        q = q.to(torch.uint8)
        half = len(q) // 2
        return {"W_q": q if bits == 8 else (q[:half] << 4) | q[half:], "scale": scale, "zero": zero}, value
    index = torch.arange(n_in) // size
    if said.get("desc_act"):
        index = index[torch.randperm(n_in)]
    count = int(index.max()) + 1
    low = torch.stack([weight[:, index == g].amin(1) for g in range(count)])
    high = torch.stack([weight[:, index == g].amax(1) for g in range(count)])
    scales = ((high - low) / most).half()
    zeros = (-low / scales.float()).round().clamp(1, most).long()
    q = (weight.T / scales.float()[index] + zeros[index]).round().clamp(0, most).long()  # [in, out]
    value = ((q - zeros[index]) * scales.float()[index]).T
    if said["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {"qweight": pack(q.tolist(), 4, order), "qzeros": pack(zeros.tolist(), 4, order), "scales": scales}, value
    less = 1 if said.get("checkpoint_format", "gptq") == "gptq" else 0
    packed = {"qweight": pack(q.T.tolist(), bits).T.contiguous(), "qzeros": pack((zeros - less).tolist(), bits)}
    return {**packed, "scales": scales, "g_idx": index.int()}, value


def save(folder, name, base):
    """The checkpoint in a format, and the same one with the values it stands for in floating point."""
    plain, packed = folder / "plain", folder / name
    torch.manual_seed(1)
    model = base(plain)
    values, tensors = load_file(model / "model.safetensors"), {}
    layers = {n for n, m in tf.AutoModel.from_pretrained(model).named_modules() if type(m) is torch.nn.Linear}
    for key, tensor in list(values.items()):
        path = key.removesuffix(".weight").removeprefix("model.")
        if key.endswith(".weight") and path in layers and not any(n % GROUP for n in tensor.shape):
            parts, values[key] = stored(name, tensor)
            tensors |= {f"{key.removesuffix('.weight')}.{leaf}": part.clone() for leaf, part in parts.items()}
            values[key] = values[key].contiguous()
        else:
            tensors[key] = tensor
    save_file(values, model / "model.safetensors", {"format": "pt"})
    packed.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (packed / file.name).write_bytes(file.read_bytes())
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": FORMATS[name]}
    (packed / "config.json").write_text(json.dumps(config))
    return plain, packed


def llama(folder):
    """Of the tokenizer's size, its layers in whole groups of eight."""
    made = language_bases.llama_like()
    config = tf.LlamaConfig(
        vocab_size=len(made), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=127, initializer_range=0.2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(params=list(FORMATS))
def pair(request, tmp_path):
    plain, packed = save(tmp_path, request.param, llama)
    kind = FORMATS[request.param]["quant_method"]
    return plain, packed, kind


def test_a_checkpoint_is_read_as_its_format_says(pair):
    plain, packed, kind = pair
    config = tf.AutoConfig.from_pretrained(packed)
    assert stored_as(config) == kind
    assert settled_weights("auto", config, "fp32") == kind
    with pytest.raises(ConfigError, match=f"memory.weights=nf4: the checkpoint is stored as {kind}"):
        settled_weights("nf4", config, "fp32")
    model, info = Storage(kind).load(tf.AutoModelForCausalLM, str(packed))
    assert not info["missing_keys"]
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 14
    own = dict(tf.AutoModelForCausalLM.from_pretrained(plain).named_modules())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.allclose(codec_of(module).read(module), own[name].weight, atol=1e-6), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, own[""](ids).logits, atol=1e-4)


def test_adapters_train_on_it_and_the_gradients_are_right(pair):
    plain, packed, kind = pair
    torch.manual_seed(0)
    settings = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    models = [Storage(kind).load(tf.AutoModelForCausalLM, str(packed))[0], tf.AutoModelForCausalLM.from_pretrained(plain)]
    one, other = (get_peft_model(m, settings) for m in models)
    other.load_state_dict(one.state_dict())
    ids = torch.arange(3, 40)[None]
    grads = []
    for model in (one, other):
        model.train()(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_it_has_the_parameters_of_the_checkpoint_it_was_made_from(pair):
    plain, packed, kind = pair
    settings = LoraConfig(r=3, target_modules="all-linear")
    one = get_peft_model(Storage(kind).load(tf.AutoModelForCausalLM, str(packed))[0], settings)
    other = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(plain), settings)
    assert one.get_nb_trainable_parameters() == other.get_nb_trainable_parameters()
    assert one.adapter_report() == other.adapter_report()


def test_merging_writes_groups_and_comes_off_exactly(pair):
    _, packed, kind = pair
    model, _ = Storage(kind).load(tf.AutoModelForCausalLM, str(packed))
    for module in list(model.modules()):
        if isinstance(module, PackedLinear):
            before = module.weight.clone()
            codec_of(module).write(module, codec_of(module).read(module))
            assert torch.equal(module.weight, before)  # what was read is written without loss
    model, _ = Storage(kind).load(tf.AutoModelForCausalLM, str(packed))
    model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    bits = {n: p.clone() for n, p in model.named_parameters()}
    report = rounding(model.adapters)
    assert len(report.layers) == 14
    assert report.error < (0.02 if "8" in str(packed.name) else 0.2)
    with pytest.raises(MergeError, match="T17"):
        model.merge_adapter(max_error=1e-9)
    model.merge_adapter(max_error=float("inf"))
    for layer, told in zip(model.adapters.layers.values(), report.layers, strict=True):
        assert float(layer.view.weight().norm()) == pytest.approx(told.weight, rel=0.05)
    model.unmerge_adapter()
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_a_run_on_it_is_whole(tmp_path):
    _, packed = save(tmp_path, "gptq", llama)
    recipe = case("causal_lm", tmp_path)
    recipe.model, recipe.memory = str(packed), MemoryOptions()
    run = prepare(recipe, tmp_path / "run")
    assert run.recipe.memory.weights == "gptq"
    assert run.execute()["read_back"]["largest_difference"] < 1e-4
    loaded = TrainedRun.load(tmp_path / "run")
    assert any(isinstance(m, PackedLinear) for m in loaded.model.modules())


@pytest.mark.parametrize(
    "said",
    [{"bits": 3, "quant_method": "gptq"}, {"bits": 4, "quant_method": "awq", "version": "gemv"},
     {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3, "group_size": 8, "axis": 1}}}],
)  # fmt: skip
def test_a_variant_that_is_not_read_is_refused_before_weights_are_read(said, tmp_path):
    tf.LlamaConfig().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"this {said['quant_method']} checkpoint has .*Take the checkpoint in 16 bits"):
        Storage(said["quant_method"]).load(tf.AutoModelForCausalLM, str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("hqq") is None, reason="hqq is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_hqq_itself_stands_for_the_same_weight(bits):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40)
    settings = BaseQuantizeConfig(nbits=bits, group_size=8, axis=1)
    theirs = HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu")
    state = theirs.state_dict()
    ours = PackedLinear(24, 40, kind="hqq", bits=bits, group_size=8, bias=True)
    ours.weight.data, ours.scales.data, ours.qzeros.data = state["W_q"].data, state["scale"], state["zero"]
    assert torch.allclose(ours.value(torch.float32), theirs.dequantize().float(), atol=1e-3)
