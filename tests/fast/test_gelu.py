"""GELU's tanh form by another way: the same bits, and torch's own wherever the way does not lead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afina.fast import gelu
from afina.fast.gelu import quick_gelu
from afina.memory.keeping import _gives, keep_less

tanh = nn.GELU(approximate="tanh")
multiplied = pytest.mark.skipif(not gelu._works(), reason="oneDNN does not multiply bfloat16 on this processor (AVX-512)")


@multiplied
def test_all_but_five_values_have_the_bits_of_torchs_own():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.isfinite() & (bits.abs() >= torch.finfo(torch.bfloat16).tiny)]
    x = torch.cat([x, x[: -len(x) % 32]])
    with quick_gelu():
        found = tanh(x)
    expected = tanh(x)
    small = expected.abs() <= torch.finfo(torch.bfloat16).tiny  # zero far out, or subnormal
    others = (found != expected) & ~small
    assert others.sum() <= 5
    torch.testing.assert_close(found[others], expected[others], rtol=2**-7, atol=0)
    assert found[small].abs().max() < 2e-7


@multiplied
@pytest.mark.parametrize("shape", [(7, 13, 384), (1, 32768), (512, 33)])
def test_gradients_are_torchs_own(shape, monkeypatch):
    x = torch.randn(shape).bfloat16().requires_grad_()
    g = torch.randn_like(x)
    wanted = tanh(x), *torch.autograd.grad(tanh(x), x, g)
    taken: list[torch.Tensor] = []
    value = gelu._value
    monkeypatch.setattr(gelu, "_value", lambda x: taken.append(x) or value(x))
    with quick_gelu():
        y = tanh(x)
        found = y, *torch.autograd.grad(y, x, g)
    torch.testing.assert_close(found[0], wanted[0], rtol=2**-7, atol=0)  # the last bit
    assert torch.equal(found[1], wanted[1])
    assert len(taken) == 1


@pytest.mark.parametrize(
    "x",
    [torch.randn(96, 512), torch.randn(173, 97).bfloat16(), torch.randn(5, 64).bfloat16(), torch.ones(96, 512).bfloat16().T],
    ids=["float32", "no multiple of 32", "small", "transposed"],
)
def test_what_does_not_suit_goes_torchs_way(x, monkeypatch):
    monkeypatch.setattr(gelu, "_value", lambda x: pytest.fail("not here"))
    with quick_gelu():
        assert torch.equal(tanh(x), F.gelu(x, approximate="tanh"))
        assert torch.equal(nn.GELU()(x), F.gelu(x))


def test_a_processor_that_cannot_goes_torchs_way(monkeypatch):
    def refuses(*args):
        raise RuntimeError("could not create a primitive descriptor for the inner product forward propagation primitive")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuses)
    gelu._works.cache_clear()
    try:
        x = torch.randn(96, 512).bfloat16()
        with quick_gelu():
            assert torch.equal(tanh(x), F.gelu(x, approximate="tanh"))
    finally:
        gelu._works.cache_clear()


@multiplied
def test_it_is_computed_again_for_backward_as_torchs_is():
    """What a product keeps of it is nothing: backward has the input."""
    block = nn.Sequential(nn.Linear(61, 512), tanh, nn.Linear(512, 3)).bfloat16()
    x = torch.randn(67, 61).bfloat16()

    def gradients():
        block.zero_grad()
        block(x).sum().backward()
        return [p.grad.clone() for p in block.parameters()]

    wanted = gradients()
    keep_less(block)
    with quick_gelu():
        assert _gives(block[:2](x).grad_fn)
        found = gradients()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-3)
