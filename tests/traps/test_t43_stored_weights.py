"""T43: a 4-bit weight repacked in place by an eval forward is read as if it were not: merging gives garbage.

Reading, merging and training are tested before and after train and eval passes, over every storage.
"""

import copy

import pytest
import torch
from torch import nn

from afina import IA3Config, LoraConfig
from afina.core.codecs import codec_of
from afina.core.injection import AdapterSet
from afina.errors import MergeError

bnb = pytest.importorskip("bitsandbytes")
STORAGES = ["plain", "int8", "nf4", "nf4 nested", "fp4"]
ERROR = {"plain": 1e-6, "int8": 0.02, "nf4": 0.15, "nf4 nested": 0.15, "fp4": 0.25}
IN, OUT = 128, 96
PASSES = ["none", "train", "eval", "train eval", "eval train", "eval eval"]


def layer(storage, seed=0):
    torch.manual_seed(seed)
    weight, bias = torch.randn(OUT, IN) / IN**0.5, torch.randn(OUT)
    if storage == "plain":
        made = nn.Linear(IN, OUT)
        made.weight.data, made.bias.data = weight.clone(), bias.clone()
    elif storage == "int8":
        made = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        made.bias = nn.Parameter(bias)
    else:
        kind = storage.split()[0]
        made = bnb.nn.Linear4bit(IN, OUT, quant_type=kind, compress_statistics="nested" in storage)
        made.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type=kind, compress_statistics="nested" in storage, module=made
        )
        made.bias = nn.Parameter(bias)
    return nn.ModuleDict({"layer": made.to("cpu").requires_grad_(False)}).eval(), weight


def stored(module):
    """Every stored tensor of a layer, below its wrapper: weight, scales and bias."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    found = {"weight": module.weight.data.clone(), "bias": module.bias.data.clone()}
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        found["absmax"] = state.absmax.clone()
        if state.nested:
            found["absmax2"] = state.state2.absmax.clone()
    if isinstance(module, bnb.nn.Linear8bitLt):
        scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        found["scale"] = scale.clone()
    return found


def passes(model, which):
    for kind in which.split():
        model.train(kind == "train")
        x = torch.randn(5, IN)
        if kind == "eval":
            with torch.no_grad():
                model["layer"](x)
        elif kind == "train":
            model["layer"](
                x.requires_grad_(hasattr(model["layer"], "adapters"))
            )  # bitsandbytes' own fails on a repacked one
    model.eval()


def adapt(model, config=None):
    adapters = AdapterSet.of(model) or AdapterSet(model)
    adapters.add("default", config or LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], init_lora_weights=False))
    adapters.set_active("default")
    return adapters


def apart(a, b):
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("which", [p for p in PASSES if p != "none"] + ["none"])
@pytest.mark.parametrize("storage", STORAGES)
def test_t43_a_weight_is_read_rightly_after_any_pass(storage, which):
    model, weight = layer(storage)
    passes(model, which)
    read = codec_of(model["layer"]).read(model["layer"])
    assert read.shape == weight.shape
    assert apart(read, weight) < ERROR[storage]
    adapters = adapt(model)
    assert apart(adapters.layers["layer"].view.weight(), weight) < ERROR[storage]
    passes(model, which)
    assert apart(adapters.layers["layer"].view.weight(), weight) < ERROR[storage]


def test_t43_the_naive_way_reads_garbage():
    """On a processor that repacks; elsewhere there is nothing to show."""
    model, weight = layer("nf4")
    passes(model, "eval")
    state = model["layer"].weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("this processor does not repack 4-bit weights")
    assert apart(bnb.functional.dequantize_4bit(model["layer"].weight.data, state), weight) > 0.5


@pytest.mark.parametrize("after", PASSES)
@pytest.mark.parametrize("before", ["none", "eval"], ids=["wrapped fresh", "wrapped after an eval pass"])
@pytest.mark.parametrize("storage", STORAGES)
def test_t43_merge_and_unmerge_after_any_pass(storage, before, after):
    model, weight = layer(storage)
    passes(model, before)
    adapters = adapt(model)
    passes(model, after)
    kept = stored(model["layer"])
    adapter = adapters.layers["layer"].adapters["default"]
    x = torch.randn(7, IN)
    with torch.no_grad():
        plain, want = model["layer"](x), x @ (weight + adapter.delta_weight()).T + model["layer"].bias
    assert apart(plain, want) < ERROR[storage]  # of the stored weight, seen through the layer
    adapters.merge()
    assert apart(adapters.layers["layer"].view.weight(), weight + adapter.delta_weight()) < 1.5 * ERROR[storage]
    with torch.no_grad():
        merged = model["layer"](x)
        again = model["layer"](x)  # an eval pass over the merged weight changes nothing either
    assert apart(merged, want) < 1.5 * ERROR[storage]
    torch.testing.assert_close(again, merged, rtol=1e-2, atol=1e-2)
    adapters.unmerge()
    for key, tensor in stored(model["layer"]).items():
        assert torch.equal(tensor, kept[key]), key
    with torch.no_grad():
        torch.testing.assert_close(model["layer"](x), plain, rtol=0, atol=0)


@pytest.mark.parametrize("storage", STORAGES)
def test_t43_gradients_after_an_eval_pass(storage):
    found = []
    for before, after in (("none", "none"), ("none", "eval"), ("eval", "none"), ("eval", "eval eval")):
        model, weight = layer(storage)
        passes(model, before)
        torch.manual_seed(3)
        adapters = adapt(model)
        passes(model, after)
        model.train()
        x = torch.randn(5, IN, generator=torch.Generator().manual_seed(4)).requires_grad_()
        model["layer"](x).square().sum().backward()
        adapter = adapters.layers["layer"].adapters["default"]
        assert x.grad is not None
        found.append((x.grad, adapter.lora_A.grad, adapter.lora_B.grad))
        y = (x @ (weight + adapter.delta_weight()).T + model["layer"].bias).detach()
        assert apart(x.grad, 2 * y @ (weight + adapter.delta_weight()).detach()) < 2 * ERROR[storage]
    for grads in found[1:]:
        for grad, want in zip(grads, found[0], strict=True):
            assert apart(grad, want) < 1e-2


@pytest.mark.parametrize("storage", STORAGES)
def test_t43_merge_and_unload_and_copies(storage):
    model, _weight = layer(storage)
    passes(model, "eval")
    adapters = adapt(model)
    adapter = adapters.layers["layer"].adapters["default"]
    x = torch.randn(7, IN)
    with torch.no_grad():
        want = model["layer"](x)
        torch.testing.assert_close(copy.deepcopy(model)["layer"](x), want, rtol=1e-2, atol=1e-2)
    delta = adapter.delta_weight().detach()
    adapters.merge(keep=False)
    adapters.unload()
    assert type(model["layer"]) in (nn.Linear, bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    with torch.no_grad():
        assert apart(model["layer"](x), want) < 1.5 * ERROR[storage]
    assert delta.norm() > 0.1


@pytest.mark.parametrize("storage", STORAGES)
def test_t43_scaling_methods_merge_too(storage):
    model, weight = layer(storage)
    passes(model, "eval")
    config = IA3Config(target_modules=["layer"], feedforward_modules=[], init_ia3_weights=False)
    adapters = adapt(model, config)
    kept = stored(model["layer"])
    x = torch.randn(7, IN)
    with torch.no_grad():
        want = model["layer"](x)
        adapters.merge()
        assert apart(model["layer"](x), want) < 1.5 * ERROR[storage]
    adapters.unmerge()
    assert all(torch.equal(tensor, kept[key]) for key, tensor in stored(model["layer"]).items())
    assert weight.shape == (OUT, IN)


@pytest.mark.parametrize("storage", STORAGES)
def test_t43_two_adapters_merge_in_any_order_and_come_off_exactly(storage):
    model, _weight = layer(storage)
    adapters = adapt(model)
    adapters.add("other", LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False))
    kept = stored(model["layer"])
    x = torch.randn(7, IN)
    adapters.set_active(["default", "other"])
    with torch.no_grad():
        want = model["layer"](x)
    for order in (["default", "other"], ["other", "default"]):
        for name in order:
            adapters.merge([name])
        with torch.no_grad():
            assert apart(model["layer"](x), want) < 2 * ERROR[storage]
        adapters.unmerge()
        assert all(torch.equal(tensor, kept[key]) for key, tensor in stored(model["layer"]).items())


def test_t43_values_that_are_not_finite_are_not_merged():
    model, _weight = layer("nf4")
    adapters = adapt(model)
    kept = stored(model["layer"])
    with torch.no_grad():
        adapters.layers["layer"].adapters["default"].lora_A[0, 0] = float("inf")
    with pytest.raises(MergeError, match="not finite"):
        adapters.merge()
    assert all(torch.equal(tensor, kept[key]) for key, tensor in stored(model["layer"]).items())
    assert adapters.merged == ()
