"""A layer with other tensors in the place of its parameters computes what torch's functional_call says it does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import afina
from afina.core.layers import view_of

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(7, 5), (3, 7)),
    "conv": (nn.Conv2d(3, 5, 3), (2, 3, 7, 5)),
    "layer norm": (nn.LayerNorm(7), (3, 7)),
    "layer norm without a bias": (nn.LayerNorm(7, bias=False), (3, 7)),
    "rms norm": (nn.RMSNorm(7), (3, 7)),
    "rms norm of llama": (LlamaRMSNorm(7), (3, 7)),
    "group norm": (nn.GroupNorm(3, 6), (2, 6, 5)),
    "batch norm": (nn.BatchNorm1d(6), (5, 6, 3)),
}


@pytest.mark.parametrize("hooked", [False, True], ids=["bare", "hooked"])
@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_with_what_it_is_given_and_keeps_its_own_statistics(name: str, hooked: bool) -> None:
    torch.manual_seed(3)
    layer, shape = copy.deepcopy(LAYERS[name])
    twin, x = copy.deepcopy(layer), torch.randn(shape)
    seen: list[Any] = []
    if hooked:
        layer.register_forward_hook(lambda module, args, y: seen.append(module))
    own = {n: p.detach().clone() for n, p in layer.named_parameters()}
    given = {n: torch.randn_like(p).requires_grad_() for n, p in layer.named_parameters()}
    expected = torch.func.functional_call(twin, given, (x,))
    found = view_of(layer).holding(**given)(x)
    assert torch.equal(found, expected)
    assert seen == ([layer] if hooked else [])
    assert all(torch.equal(p, own[n]) for n, p in layer.named_parameters())
    assert all(torch.equal(b, twin.get_buffer(n)) for n, b in layer.named_buffers())
    found.square().sum().backward()
    assert all(g.grad is not None for g in given.values())
    if view_of(layer).kind == "norm":
        assert torch.equal(view_of(layer.eval()).apply(x, **given), torch.func.functional_call(twin.eval(), given, (x,)))


def test_a_trained_bias_adds_nothing_to_what_a_plain_layer_keeps() -> None:
    base = nn.Sequential(nn.Linear(7, 5)).requires_grad_(False)
    model = afina.get_peft_model(base, afina.BitFitConfig(target_modules=["0"]))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model.train()(torch.randn(3, 7))
    assert y.requires_grad
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {t.untyped_storage().data_ptr() for t in kept} <= places
