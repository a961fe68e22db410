"""Attention as plain products: as near to the truth as torch's own, forward and backward, and used where it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from bases import made, rows

from afina import LoraConfig, get_peft_model
from afina.fast import attention
from afina.fast.attention import _Products, _stretches, short_attention

MASKS = ["none", "causal", "padding", "additive", "a head each"]


def parts(rows=3, heads=4, queries=7, keys=7, width=13, groups=4, dtype=torch.bfloat16):
    chance = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, queries, width), (rows, groups, keys, width), (rows, groups, keys, width)]
    return [torch.randn(s, generator=chance).to(torch.bfloat16).to(dtype).requires_grad_() for s in shapes]


def masks(name, rows=3, heads=4, queries=7, keys=7):
    seen = torch.arange(keys) < torch.tensor([keys, 2, 1])[:rows, None, None, None]
    if name == "padding":
        return {"attn_mask": seen.expand(rows, 1, queries, keys)}
    if name == "additive":
        return {"attn_mask": torch.zeros(rows, 1, queries, keys).masked_fill(~seen, -1e30).bfloat16()}
    if name == "a head each":
        return {"attn_mask": torch.randn(1, heads, queries, keys, generator=torch.Generator().manual_seed(1)).bfloat16()}
    return {"is_causal": True} if name == "causal" else {}


def attended(inputs, options, g):
    out = F.scaled_dot_product_attention(*inputs, **options)
    out.backward(g.to(out.dtype))
    return [out.detach().double(), *(t.grad.double() for t in inputs)]


@pytest.mark.parametrize("at_once", [1, 2, 5, 1 << 19])  # heads
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("queries", "keys", "groups"), [(7, 7, 4), (1, 13, 4), (11, 11, 2)])
def test_errors_are_those_of_torch(mask, queries, keys, groups, at_once, monkeypatch):
    monkeypatch.setattr(attention, "_AT_ONCE", at_once * queries * keys)
    options = masks(mask, queries=queries, keys=keys)
    options |= {"enable_gqa": True} if groups < 4 else {}
    g = torch.randn(3, 4, queries, 13, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = {k: v.double() if k == "attn_mask" and v.dtype != torch.bool else v for k, v in options.items()}
    truth = attended(parts(queries=queries, keys=keys, groups=groups, dtype=torch.float64), exact, g)
    theirs = attended(parts(queries=queries, keys=keys, groups=groups), options, g)
    with short_attention() as count:
        ours = attended(parts(queries=queries, keys=keys, groups=groups), options, g)
    assert (count.asked, count.used) == (1, 1)
    for true, their, our in zip(truth, theirs, ours, strict=True):
        assert float((our - true).norm()) <= 2 * float((their - true).norm()) + 2**-8 * float(true.norm())


def test_dropout_leaves_the_mean():
    inputs = parts(rows=2, queries=53, keys=53)
    with short_attention() as count, torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [F.scaled_dot_product_attention(*inputs, dropout_p=0.3).detach().float() for _ in range(400)]
        torch.manual_seed(0)
        assert torch.equal(F.scaled_dot_product_attention(*inputs, dropout_p=0.3).float(), drawn[0])
    assert count.used == 401
    whole = F.scaled_dot_product_attention(*inputs).detach().float()
    assert float((sum(drawn) / 400 - whole).norm() / whole.norm()) < 0.1
    assert float((drawn[0] - whole).norm() / whole.norm()) > 0.2


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (3, 4), (7, 12), (5, 13)])
@pytest.mark.parametrize("at_once", [1, 5, 12, 24, 31, 1000])
def test_each_head_of_each_row_is_computed_once_in_pieces_of_one_shape(rows, heads, at_once, monkeypatch):
    monkeypatch.setattr(attention, "_AT_ONCE", at_once * 35)
    pieces = list(_stretches(rows, heads, (5, 7)))
    flat = [i for _, _, at in pieces for i in range(at.start, at.stop)]
    assert flat == list(range(rows * heads))
    assert len({at.stop - at.start for _, _, at in pieces}) == 1
    assert all(at.stop - at.start <= max(1, at_once) for _, _, at in pieces)
    for row, head, at in pieces:
        of_these = [r * heads + h for r in range(row.start, row.stop) for h in range(head.start, head.stop)]
        assert of_these == list(range(at.start, at.stop))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("at_once", [2, 1 << 19])
def test_gradients_are_those_of_the_outcome(mask, dropout, at_once, monkeypatch):
    monkeypatch.setattr(attention, "_AT_ONCE", at_once * 49)
    options = masks(mask)
    bias = options.get("attn_mask")
    bias = bias.double() if bias is not None and bias.dtype != torch.bool else bias

    def drawn_alike(q, k, v):
        torch.manual_seed(0)
        return _Products.apply(q, k, v, bias, dropout, options.get("is_causal", False), 0.3)

    with torch.random.fork_rng():
        assert torch.autograd.gradcheck(drawn_alike, parts(rows=3, width=5, dtype=torch.float64), fast_mode=True)


def test_a_query_that_sees_nothing_gives_zeros_and_what_it_is_not_made_for_stays_torch_s_own():
    given = F.scaled_dot_product_attention
    inputs = parts()
    blind = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    blind[1, :, 2] = False
    with short_attention() as count:
        assert F.scaled_dot_product_attention is not given
        out = F.scaled_dot_product_attention(*inputs, attn_mask=blind)
        assert not out[1, :, 2].any()
        long = parts(keys=4 * 13 + 1)
        assert torch.equal(F.scaled_dot_product_attention(*long), given(*long))
        wide = [t.detach().float().requires_grad_() for t in inputs]
        assert torch.equal(F.scaled_dot_product_attention(*wide), given(*wide))
        assert (count.asked, count.used) == (3, 0)
        assert "torch's kernel in all 3 passes" in count.said()
        with torch.no_grad():
            assert torch.equal(F.scaled_dot_product_attention(*inputs), given(*inputs))
        assert count.asked == 3
        with torch.autocast("cpu", torch.bfloat16):  # float32 becomes bfloat16, as for torch
            assert F.scaled_dot_product_attention(*wide).dtype == torch.bfloat16
        assert count.used == 1
        assert count.said().startswith("in 1 of 4 passes through an attention plain products stood in")
    assert F.scaled_dot_product_attention is given


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "opt", "llama", "neox", "bart"])
def test_models_learn_the_same(name):
    """Gradients in bf16 are as far from those in float32 as without it."""

    def gradients(bf16, short):
        model = get_peft_model(made(name), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).eval()
        for index, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(index))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if short:
                with short_attention() as count:
                    loss = model(**rows()).logits.float().square().sum()
                    loss.backward()
                assert count.used == count.asked > 0
            else:
                loss = model(**rows()).logits.float().square().sum()
                loss.backward()
        return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.requires_grad])

    exact, theirs, ours = gradients(False, False), gradients(True, False), gradients(True, True)
    assert float((ours - exact).norm()) <= 2 * float((theirs - exact).norm()) + 0.01 * float(exact.norm())


def test_blocks_computed_again_drop_the_same():
    def gradients(again):
        torch.manual_seed(0)
        model = tf.BertModel(tf.BertConfig(vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                                           intermediate_size=29, hidden_dropout_prob=0.0)).train()  # fmt: skip
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        with short_attention() as count, torch.autocast("cpu", torch.bfloat16):
            model(**rows()).last_hidden_state.float().square().sum().backward()
        assert count.used == (4 if again else 2)
        return [p.grad for p in model.parameters() if p.grad is not None]

    for kept, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, again)
