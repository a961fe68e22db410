"""Functions of torch are given back, in whatever order the blocks are left that stood in for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from afina.fast.attention import short_attention
from afina.fast.dropout import quick_dropout
from afina.fast.gelu import quick_gelu


@pytest.mark.parametrize(("name", "block"), [
    ("gelu", quick_gelu), ("dropout", quick_dropout), ("scaled_dot_product_attention", short_attention),
])  # fmt: skip
def test_blocks_may_be_left_in_any_order(name, block, monkeypatch):
    own, one, two = getattr(F, name), block(), block()
    one.__enter__()
    two.__enter__()
    assert getattr(F, name) is not own
    one.__exit__(None, None, None)
    assert getattr(F, name) is not own
    two.__exit__(None, None, None)
    assert getattr(F, name) is own

    def other(*given, **more):
        return own(*given, **more)

    monkeypatch.setattr(F, name, other)  # what another library put there comes back
    with block():
        assert getattr(F, name) is not other
    assert getattr(F, name) is other


def test_attention_is_counted_of_every_block_that_is_entered():
    q = torch.randn(2, 3, 5, 7, dtype=torch.bfloat16, requires_grad=True)
    one, two = short_attention(), short_attention()
    first = one.__enter__()
    F.scaled_dot_product_attention(q, q, q)
    second = two.__enter__()
    F.scaled_dot_product_attention(q, q, q)
    one.__exit__(None, None, None)
    F.scaled_dot_product_attention(q, q, q)
    two.__exit__(None, None, None)
    F.scaled_dot_product_attention(q, q, q)
    assert (first.asked, first.used) == (second.asked, second.used) == (2, 2)
