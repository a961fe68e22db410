"""Every mergeable method over bases that bitsandbytes stores in 8 and 4 bits: no method knows of it (T43 lies in here)."""

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

STORAGES = ["int8", "nf4", "fp4", "nf4-double"]
LINEAR = [
    n
    for n, m in methods().items()
    if m.kind == "layer" and "linear" in m.adapter.kinds and n not in ("last_layers", "ln_tuning")
]
MERGEABLE = [n for n in LINEAR if get_method(n).adapter.mergeable]


def quantised(storage: str, n_in: int = 64, n_out: int = 96) -> tuple[nn.Module, torch.Tensor]:
    """A holder of a quantised layer, and the weight before quantisation."""
    torch.manual_seed(0)
    plain = nn.Linear(n_in, n_out)
    if storage == "int8":
        layer: Any = bnb.nn.Linear8bitLt(n_in, n_out, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(n_in, n_out, quant_type=storage[:3], compress_statistics=storage.endswith("double"))
        layer.weight = bnb.nn.Params4bit(
            plain.weight.data.clone(), requires_grad=False, quant_type=storage[:3], module=layer,
            compress_statistics=storage.endswith("double"),
        )  # fmt: skip
    layer.bias = nn.Parameter(plain.bias.data.clone())
    layer.to("cpu")
    return Holder(layer), plain.weight.data


def adapt(method: str, storage: str, *, eval_before: bool = False) -> tuple[nn.Module, AdapterSet, torch.Tensor]:
    holder, weight = quantised(storage)
    if eval_before:
        with torch.no_grad():
            holder.eval()(torch.randn(3, 64))
    adapters = AdapterSet(holder)
    options = {**VARIANTS.get(method, [{}])[0], "target_modules": ["layer"]}
    adapters.add("one", get_method(method).make_config(**options))
    adapters.set_active("one")
    with torch.no_grad():
        for adapter in adapters.adapters("one"):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return holder, adapters, weight


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("storage", STORAGES)
def test_the_weight_reads_the_same_before_and_after_every_kind_of_pass(storage: str) -> None:
    """A 4-bit weight that an eval pass has repacked is read right (T43)."""
    holder, weight = quantised(storage)
    layer: Any = holder.layer
    codec, limit = codec_of(layer), 0.01 if storage == "int8" else 0.15 if storage.startswith("nf4") else 0.2
    first = codec.read(layer).clone()
    assert relative(first.float(), weight) < limit
    assert logical_numel(layer.weight) == weight.numel()
    for mode, grad in ((True, True), (False, False), (False, False), (True, False)):
        with torch.set_grad_enabled(grad):
            holder.train(mode)(torch.randn(5, 64))
        assert relative(codec.read(layer).float(), first.float()) < 0.005
    codec.write(layer, codec.read(layer).float() * 2)
    assert relative(codec.read(layer).float(), 2 * first.float()) < limit


@pytest.mark.parametrize("eval_before", [False, True], ids=["fresh", "after-eval"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", MERGEABLE)
def test_merging_errs_by_the_quantisation_alone_and_unmerging_is_exact(method: str, storage: str, eval_before: bool) -> None:
    holder, adapters, _ = adapt(method, storage, eval_before=eval_before)
    holder.train()
    x = torch.randn(7, 64)
    layer: Any = holder.layer
    stored, data = layer.base_layer.weight, layer.base_layer.weight.data.clone()
    before = holder(x)
    merged, _ = next(adapters.adapters("one")).merge_into(view_of(layer.base_layer).weight().float(), layer.base_layer.bias)
    adapters.merge()
    again = view_of(layer.base_layer).weight().float()
    assert relative(again, merged) < (0.01 if storage == "int8" else 0.15 if storage.startswith("nf4") else 0.2)
    assert relative(holder(x), before) < (0.02 if storage == "int8" else 0.2 if storage.startswith("nf4") else 0.3)
    adapters.unmerge()
    assert layer.base_layer.weight is stored
    assert torch.equal(layer.base_layer.weight.data, data)
    assert torch.equal(holder(x), before)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", LINEAR)
def test_trains_over_a_quantised_base_also_after_an_eval_pass(method: str, storage: str) -> None:
    holder, _, _ = adapt(method, storage)
    x = torch.randn(7, 64, requires_grad=True)
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
    bare.layer.support_avx512bf16_for_cpu = False
    x = torch.randn(3, 64)
    with torch.no_grad(), adapters.disabled():
        assert torch.equal(holder.eval()(x), bare.eval()(x))
