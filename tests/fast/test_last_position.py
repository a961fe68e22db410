"""The last block at one position gives the logits and gradients of all of them."""

from __future__ import annotations

import pytest
import torch
from bases import BASES, made, rows

from afina import LoraConfig, get_peft_model
from afina.fast.blocks import find_stack
from afina.fast.last_position import narrowed, position_read

FIRST = {"bert", "roberta", "distilbert", "electra"}
LAST = {"gpt2", "opt", "llama", "qwen2", "mistral", "neox"}


def still(name, lora=False):
    """Without dropout, all of it trained."""
    model = made(name)
    stack = find_stack(model, lambda: model.eval()(**rows()))
    if lora:
        get_peft_model(model, LoraConfig(r=3, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False))
    else:
        model.requires_grad_(True)
    return model.eval(), stack


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).logits.float().logsumexp(-1).square().sum()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", sorted(FIRST | LAST))
def test_one_position_gives_what_all_give(name, lora):
    model, stack = still(name, lora)
    block, batch = stack.blocks[-1], rows()
    position = position_read(block, batch["attention_mask"], lambda: model(**batch).logits.sum())
    assert position == ("first" if name in FIRST else "last")
    loss, expected = gradients(model, batch)
    with narrowed(stack.owner, block, position):
        found, got = gradients(model, batch)
        alone = model(**{k: v[2:3, :2] for k, v in batch.items()}).logits  # a row without padding
    assert found == pytest.approx(loss, rel=1e-5)
    assert expected.keys() == got.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for n, gradient in expected.items():
        torch.testing.assert_close(got[n], gradient, rtol=1e-3, atol=1e-5 * scale, msg=n)
    torch.testing.assert_close(alone, model(**batch).logits[2:3], rtol=1e-4, atol=1e-5)
    assert gradients(model, batch)[0] == loss  # nothing is left behind


@pytest.mark.parametrize("length", [12, 24, 29])  # a head's size, the width, the inner width
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_rows_may_be_as_long_as_a_layer_is_wide(name, length):
    model, stack = still(name, lora=True)
    batch = rows(length=length)
    position = "first" if name in FIRST else "last"
    loss, expected = gradients(model, batch)
    with narrowed(stack.owner, stack.blocks[-1], position):
        found, got = gradients(model, batch)
    assert found == pytest.approx(loss, rel=1e-5)
    scale = max(float(g.abs().max()) for g in expected.values())
    for n, gradient in expected.items():
        torch.testing.assert_close(got[n], gradient, rtol=1e-3, atol=1e-5 * scale, msg=n)


@pytest.mark.parametrize("name", sorted(set(BASES) - FIRST - LAST - {"t5", "bart"}))
def test_an_architecture_of_another_kind_is_told_and_not_changed(name):
    model, stack = still(name)
    batch = rows()
    position = position_read(stack.blocks[-1], batch["attention_mask"], lambda: model(**batch).logits.sum())
    expected = model(**batch).logits
    with narrowed(stack.owner, stack.blocks[-1], position), pytest.raises((NotImplementedError, RuntimeError)):
        model(**batch)
    assert torch.equal(model(**batch).logits, expected)


def test_a_model_that_reads_every_position_is_not_narrowed():
    import transformers as tf

    torch.manual_seed(0)
    model = tf.BertForTokenClassification(
        tf.BertConfig(vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29)
    ).eval()
    batch = rows()
    read = position_read(model.bert.encoder.layer[-1], batch["attention_mask"], lambda: model(**batch).logits.sum())
    assert read is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_it_holds_in_sixteen_bits_and_with_padding_on_the_left(name):
    model, stack = still(name)
    batch = {k: v.flip(1) for k, v in rows().items()}
    position = position_read(stack.blocks[-1], batch["attention_mask"], lambda: model(**batch).logits.sum())
    if name == "bert":
        assert position is None or position == "first"
    if position is None:
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**batch).logits
        with narrowed(stack.owner, stack.blocks[-1], position):
            torch.testing.assert_close(model(**batch).logits, expected, rtol=2e-2, atol=2e-2)
