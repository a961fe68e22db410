"""What is alive when, of code that is run without contents: laws on small code whose storages can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from afina.memory.devices import backward, kernels_of
from afina.memory.trace import Trace, faked

FLOAT = 4
ROWS, WIDTH = 7, 13


def made(trace, *shape, **settings):
    tensor = faked(trace, torch.empty(*shape, device="meta"))
    trace.follow([tensor], "weights")
    return tensor.requires_grad_(settings.get("learned", False))


def test_what_is_let_go_is_not_counted_and_what_is_kept_is():
    with Trace() as trace:
        x = made(trace, ROWS, WIDTH)
        with trace.phase("evaluate"):
            y = x.exp()  # x and y
            y = y.sin()  # x, the old y, the new y
            y = y.sum()  # x, y, one number
            del y
    assert trace.peak("evaluate").parts == {"weights": ROWS * WIDTH * FLOAT, "workspace": 2 * ROWS * WIDTH * FLOAT}


def test_views_and_changes_in_place_take_nothing():
    with Trace() as trace:
        x = made(trace, ROWS, WIDTH)
        with trace.phase("evaluate"):
            x.view(WIDTH, ROWS).t().add_(1.0)
    assert trace.peak("evaluate").total == ROWS * WIDTH * FLOAT


def chain(x, weights, *, again):
    for weight in weights:
        x = (
            checkpoint(lambda x, w: torch.tanh(torch.exp(x * w)), x, weight, use_reentrant=False)
            if again
            else torch.tanh(torch.exp(x * weight))
        )
    return x.sum()


@pytest.mark.parametrize("again", [False, True])
def test_activations_are_what_backward_needs(again):
    """exp and tanh keep their results, a product its factor: two tensors and the input a block, or its input alone."""
    count, size = 5, ROWS * WIDTH * FLOAT
    with Trace() as trace:
        weights = [made(trace, WIDTH, learned=True) for _ in range(count)]
        x = made(trace, ROWS, WIDTH)
        with kernels_of("cpu"):
            with trace.phase("forward"):
                loss = chain(x, weights, again=again)
            held = trace.peak("forward").parts["activations"]
            with trace.phase("backward"):
                backward(loss)
        trace.follow((w.grad for w in weights), "gradients")
        peak = trace.peak()
    kept = (count - 1) * size if again else 2 * count * size
    assert kept <= held <= kept + size + 2 * FLOAT
    assert peak.parts["weights"] == count * WIDTH * FLOAT + size
    if again:  # one block at a time is there in full
        assert peak.total < (count + 6) * size + 2 * count * WIDTH * FLOAT


def test_values_of_whole_numbers_are_known():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with Trace() as trace, kernels_of("cpu"):
        x, inside = made(trace, 2, 3, 5), faked(trace, mask)
        assert bool(inside.all()) is False
        assert int(inside.sum()) == 3
        chosen = inside.bool()
        assert chosen.nonzero().tolist() == mask.nonzero().tolist()
        assert x[chosen].shape == (3, 5)
        assert inside.cumsum(1).max(1).values.tolist() == [2, 1]
        inside[0, 2] = 1
        assert inside.sum(1).tolist() == [3, 1]
        assert x.sum().item() == 1.0  # nothing is known of it, and code goes on
        assert x.cpu().numpy().shape == (2, 3, 5)
        with pytest.raises(NotImplementedError, match="values that are not known"):
            (x > 0).nonzero()


def test_hidden_memory_is_there_during_its_operation_alone():
    def hidden(operation, given, result):
        return 10**6 if "mm" in str(operation) else 0

    with Trace(hidden=hidden) as trace:
        x = made(trace, ROWS, WIDTH)
        with trace.phase("evaluate"):
            x @ x.t()
        with trace.phase("step"):
            x + x
    assert trace.peak("evaluate").parts["workspace"] >= 10**6
    assert trace.peak("step").total < 10**4


def test_a_gpu_keeps_no_scores_of_attention():
    def attended(device):
        with Trace() as trace, kernels_of(device):
            q = made(trace, 2, 3, 127, 8, learned=True)
            mask = faked(trace, torch.ones(2, 1, 127, 127, dtype=torch.bool))
            with trace.phase("forward"):
                y = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=0.1).sum()
            held = trace.peak("forward").parts["activations"]
            with trace.phase("backward"):
                backward(y)
        return held

    scores = 2 * 3 * 127 * 127 * FLOAT
    assert attended("cuda") < scores < attended("cpu")
