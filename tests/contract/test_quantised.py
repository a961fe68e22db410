"""Every mergeable method over bases that bitsandbytes and torchao store in 8 and 4 bits: no method knows of it (T43 lies in
here). "lean" are the layers as afina loads them itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import VARIANTS, Holder
from torch import nn

from afina.core.codecs import codec_of, logical_numel
from afina.core.injection import AdapterSet
from afina.core.layers import view_of
from afina.core.registry import get_method, methods

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

STORAGES = ["int8", "nf4", "fp4", "nf4-double", "torchao", "int8-lean", "nf4-lean", "nf4-misaligned"]
EIGHT = ("int8", "torchao")
LINEAR = [
    n
    for n, m in methods().items()
    if m.kind == "layer" and "linear" in m.adapter.kinds and n not in ("last_layers", "ln_tuning")
]
MERGEABLE = [n for n in LINEAR if get_method(n).adapter.mergeable]


def width(storage: str) -> int:
    """Inputs of the layer; blocks of 64 values do not fit into rows of 96."""
    return 96 if storage == "nf4-misaligned" else 64


def quantised(storage: str) -> tuple[nn.Module, torch.Tensor]:
    """A holder of a quantised layer, and the weight before quantisation."""
    torch.manual_seed(0)
    n_in, n_out = width(storage), 96 if storage in ("nf4", "fp4", "nf4-double") else 37  # bitsandbytes repacks 32 rows
    plain = nn.Linear(n_in, n_out)
    weight = plain.weight.data.clone()
    if storage == "torchao":
        ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        ao.quantize_(plain, ao.Int8WeightOnlyConfig())
        return Holder(plain.requires_grad_(False)), weight
    if storage.startswith("int8"):
        layer: Any = bnb.nn.Linear8bitLt(n_in, n_out, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(n_in, n_out, quant_type=storage[:3], compress_statistics=storage.endswith("double"))
        layer.weight = bnb.nn.Params4bit(
            plain.weight.data.clone(), requires_grad=False, quant_type=storage[:3], module=layer,
            compress_statistics=storage.endswith("double"),
        )  # fmt: skip
    layer.bias = nn.Parameter(plain.bias.data.clone())
    layer.to("cpu").requires_grad_(False)
    if storage.endswith("lean"):
        codec_of(layer).lean(layer)
    return Holder(layer), weight


def adapt(method: str, storage: str, *, eval_before: bool = False) -> tuple[nn.Module, AdapterSet, torch.Tensor]:
    holder, weight = quantised(storage)
    if eval_before and storage != "nf4-misaligned":  # which bitsandbytes itself cannot compute
        with torch.no_grad():
            holder.eval()(torch.randn(3, width(storage)))
    adapters = AdapterSet(holder)
    options = {**VARIANTS.get(method, [{}])[0], "target_modules": ["layer"]}
    adapters.add("one", get_method(method).make_config(**options))
    adapters.set_active("one")
    with torch.no_grad():
        for adapter in adapters.adapters("one"):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return holder, adapters, weight


def error_of(storage: str) -> float:
    """At most, of a quantised weight."""
    return 0.01 if storage.startswith(EIGHT) else 0.15 if storage.startswith("nf4") else 0.2


def bits(weight: Any) -> torch.Tensor:
    return getattr(weight, "qdata", weight).data.clone()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("storage", STORAGES)
def test_the_weight_reads_the_same_before_and_after_every_kind_of_pass(storage: str) -> None:
    """A 4-bit weight that an eval pass has repacked is read right (T43)."""
    holder, weight = quantised(storage)
    layer: Any = holder.layer
    codec, limit = codec_of(layer), error_of(storage)
    first = codec.read(layer).clone()
    assert relative(first.float(), weight) < limit
    assert logical_numel(layer, "weight") == weight.numel()
    if storage == "nf4-misaligned":
        codec.prepare(layer)  # bitsandbytes itself would compute with another weight
    x = torch.randn(5, width(storage))
    want = x @ first.float().T + layer.bias
    assert relative(holder.train()(x), want) < (0.02 if storage == "int8" else 1e-5)  # int8 itself rounds activations
    for mode, grad in ((True, True), (False, False), (False, False), (True, False)):
        with torch.set_grad_enabled(grad):
            holder.train(mode)(x)
        assert relative(codec.read(layer).float(), first.float()) < 0.005
    codec.write(layer, codec.read(layer).float())
    assert relative(codec.read(layer).float(), first.float()) < 0.002  # what was read is written without loss
    codec.write(layer, codec.read(layer).float() * 2)
    assert relative(codec.read(layer).float(), 2 * first.float()) < limit


@pytest.mark.parametrize("eval_before", [False, True], ids=["fresh", "after-eval"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", MERGEABLE)
def test_merging_errs_by_the_quantisation_alone_and_unmerging_is_exact(method: str, storage: str, eval_before: bool) -> None:
    holder, adapters, _ = adapt(method, storage, eval_before=eval_before)
    holder.train()
    x = torch.randn(7, width(storage))
    layer: Any = holder.layer
    stored, data = layer.base_layer.weight, bits(layer.base_layer.weight)
    before = holder(x)
    merged, _ = next(adapters.adapters("one")).merge_into(view_of(layer.base_layer).weight().float(), layer.base_layer.bias)
    adapters.merge()
    again = view_of(layer.base_layer).weight().float()
    assert relative(again, merged) < error_of(storage)
    assert relative(holder(x), before) < (1.5 if not storage.startswith(EIGHT) else 2) * error_of(storage)
    adapters.unmerge()
    assert layer.base_layer.weight is stored
    assert torch.equal(bits(layer.base_layer.weight), data)
    assert torch.equal(holder(x), before)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", LINEAR)
def test_trains_over_a_quantised_base_also_after_an_eval_pass(method: str, storage: str) -> None:
    holder, _, _ = adapt(method, storage)
    x = torch.randn(7, width(storage), requires_grad=True)
    grads = []
    for _ in range(2):
        holder.train()
        holder.zero_grad()
        x.grad = None
        holder(x).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in holder.named_parameters() if p.grad is not None} | {"x": x.grad.clone()})
        with torch.no_grad():
            holder.eval()(x)
    assert grads[0].keys() == grads[1].keys()
    assert all(".adapters." in n or n == "x" for n in grads[0])
    assert all(torch.allclose(g, grads[1][n], rtol=1e-4, atol=1e-5) and g.abs().sum() > 0 for n, g in grads[0].items())


@pytest.mark.parametrize("storage", STORAGES)
def test_disabled_is_the_quantised_base(storage: str) -> None:
    holder, adapters, _ = adapt("lora", storage)
    bare, _ = quantised(storage)
    codec_of(bare.layer).prepare(bare.layer)
    x = torch.randn(3, width(storage))
    with torch.no_grad(), adapters.disabled():
        assert torch.equal(holder.eval()(x), bare.eval()(x))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", LINEAR)
def test_gradients_are_those_of_the_weight_that_is_stored(method: str, storage: str) -> None:
    """Beside the same adapter over a plain layer that holds the dequantised weight."""
    holder, adapters, _ = adapt(method, storage)
    layer: Any = holder.layer
    plain = nn.Linear(width(storage), layer.base_layer.out_features)
    plain.weight.data, plain.bias.data = view_of(layer.base_layer).weight().float().clone(), layer.base_layer.bias.data
    other = Holder(plain)
    beside = AdapterSet(other)
    beside.add("one", adapters.configs["one"])
    beside.set_active("one")
    pairs = zip(adapters.adapters("one"), beside.adapters("one"), strict=True)
    for adapter, twin in pairs:
        twin.load_state_dict(adapter.state_dict())
    x = torch.randn(7, width(storage))
    found = []
    for model in (holder.train(), other.train()):
        y = model(x)
        y.tanh().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for got, want in zip(*found, strict=True):
        assert relative(got, want) < (0.05 if storage == "int8" else 1e-4)  # int8 itself rounds activations


@pytest.mark.parametrize("storage", ["torchao", "int8-lean", "nf4-lean", "nf4-misaligned"])
@pytest.mark.parametrize("method", LINEAR)
def test_backward_keeps_no_weight_in_floating_point(method: str, storage: str) -> None:
    """Law 14 over quantised layers: what is kept is what is stored, and activations."""
    holder, adapters, weight = adapt(method, storage)
    adapter = next(adapters.adapters("one"))
    rows = 5
    x = torch.randn(rows, width(storage), requires_grad=True)
    parts = [getattr(p, "qdata", p) for p in [*holder.parameters(), *holder.buffers()]]
    own = {p.untyped_storage().data_ptr() for p in parts}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own | {x.untyped_storage().data_ptr()}:
            assert not (tensor.dtype.is_floating_point and tensor.numel() >= weight.numel()), tuple(tensor.shape)
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = holder.train()(x)
    y.sum().backward()
    scales = weight.shape[0] + weight.numel() + weight.numel() // 64  # what the storage itself consists of
    small = sum(p.numel() for p in adapter.parameters())
    assert sum(kept.values()) <= adapter.values_kept(rows) + scales + 4 * small + rows * sum(weight.shape)
