"""Dropout from fewer bits: the rate, the mean and the gradient of dropout, and masks that follow from torch's generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afina.core.dropout import _SOURCE, drop, keep_mask
from afina.fast.dropout import quick_dropout


@pytest.mark.parametrize("p", [0.1, 0.37])
@pytest.mark.parametrize("shape", [(53, 61, 97), (313_001,)])
def test_rate_and_independence(p, shape):
    torch.manual_seed(0)
    kept, factor = keep_mask(torch.empty(shape), p)
    assert kept.shape == shape
    share = kept.double()
    n, deviation = kept.numel(), (p * (1 - p)) ** 0.5
    assert abs(float(share.mean()) - (1 - p)) < 5 * deviation / n**0.5
    flat = (share.flatten() - (1 - p)) / deviation
    for step in (1, 2, 3, 4, 8):
        assert abs(float((flat[:-step] * flat[step:]).mean())) < 5 / n**0.5
    assert factor == pytest.approx(1 / (1 - p), rel=1e-4)
    again, _ = keep_mask(torch.empty(shape), p)
    assert abs(float((flat * (again.double().flatten() - (1 - p)) / deviation).mean())) < 5 / n**0.5


@pytest.mark.parametrize("count", [0, 1, 5, 2049])
def test_the_bits_are_those_of_numpys_generator_of_that_seed(count):
    """It is seeded in its memory, the form of which numpy does not promise."""
    torch.manual_seed(count)
    found = _SOURCE.bits(count)
    torch.manual_seed(count)
    generator = np.random.SFC64(0)
    state = generator.state
    torch.from_numpy(state["state"]["state"][:3].view(np.int64)).random_()
    state["state"]["state"][3] = 1
    generator.state = state
    generator.random_raw(12)
    assert np.array_equal(found, generator.random_raw(count))


FEW, MANY = (7, 11, 13), (17, 19, 23)  # to either side of where a node of its own pays


@pytest.mark.parametrize("shape", [FEW, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_drops_as_torch_does_but_for_the_numbers(dtype, shape):
    layer, x = nn.Dropout(0.25), torch.randn(shape).to(dtype).requires_grad_()
    with quick_dropout():
        torch.manual_seed(3)
        y = layer(x)
        g = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, g)
        torch.manual_seed(3)
        assert torch.equal(layer(x), y)
        assert not torch.equal(layer(x), y)
        assert torch.equal(layer.eval()(x), x)
    kept = y != 0
    lift = torch.tensor(1 / 0.75).to(dtype)
    torch.testing.assert_close(y, torch.where(kept, x * lift, torch.zeros((), dtype=dtype)), rtol=2e-2, atol=0)
    torch.testing.assert_close(dx, torch.where(kept, g * lift, torch.zeros((), dtype=dtype)), rtol=2e-2, atol=0)


def test_ends_of_the_range_and_second_derivatives():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    with quick_dropout():
        assert torch.equal(F.dropout(x, 1.0), torch.zeros_like(x))
        assert torch.equal(F.dropout(x, 0.0), x)
        with pytest.raises(ValueError, match="probability"):
            F.dropout(x, 1.5)

        def dropped(x):
            torch.manual_seed(5)
            return F.dropout(x, 0.4).pow(3)

        assert torch.autograd.gradcheck(dropped, (x,))
        assert torch.autograd.gradgradcheck(dropped, (x,))


@pytest.mark.parametrize("shape", [FEW, MANY])
def test_it_drops_what_the_mask_of_that_seed_says_in_both_derivatives(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(11)
    kept, factor = keep_mask(x, 0.3)
    torch.manual_seed(11)
    y = drop(x, 0.3, training=True)
    seen = kept * factor
    torch.testing.assert_close(y, x * seen)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(dx, 3 * x.square() * seen**3)
    torch.testing.assert_close(torch.autograd.grad(dx.sum(), x)[0], 6 * x * seen**3)
