"""Frozen weights held in 16 bits: the same bits as by casting them in every step, and everything back at the end."""

from __future__ import annotations

import gc
from contextlib import ExitStack

import pytest
import torch
import transformers as tf
from test_loop import places, prepared  # noqa: F401 (a fixture)

from afina import LoraConfig, get_peft_model
from afina.memory import ready
from afina.memory.ready import ready_bytes, ready_weights

SMALL = {"vocab_size": 53, "hidden_size": 26, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 29}
BASES = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=53, n_embd=26, n_layer=2, n_head=2)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=53, d_model=26, d_kv=13, d_ff=29, num_layers=2, num_heads=2, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(hidden_size=26, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29, image_size=14,
                     patch_size=7)
    ),
}  # fmt: skip


def adapted(name, **options):
    torch.manual_seed(0)
    model = get_peft_model(BASES[name](), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, **options))
    return model


def step(model, name):
    """Loss and gradients of a step with dropout."""
    torch.manual_seed(1)
    ids = torch.randint(2, 53, (3, 11))
    inputs = {"pixel_values": torch.randn(3, 3, 14, 14)} if name == "vit" else {"input_ids": ids}
    inputs["labels"] = ids if name in ("gpt2", "t5") else torch.tensor([0, 1, 1])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("name", list(BASES))
def test_the_bits_of_a_step_are_the_same(name):
    model = adapted(name)
    before = {id(p): n for n, p in model.named_parameters()}
    cast = step(model, name)
    with ready_weights(model, torch.bfloat16) as copies:
        assert sum(c.nbytes for c in copies) == ready_bytes_of(model, copies) > 0
        held = step(model, name)
    assert held.keys() == cast.keys()
    for key, value in cast.items():
        assert torch.equal(held[key], value), key
    assert {id(p): n for n, p in model.named_parameters()} == before


def ready_bytes_of(model, copies):
    assert ready_bytes(model, torch.bfloat16) == 0  # there is nothing left to copy
    return sum(2 * c.numel() for c in copies)


def test_weights_go_back_when_a_step_fails_and_copies_are_let_go():
    model = adapted("bert")
    weights = list(model.parameters())
    expected = ready_bytes(model, torch.bfloat16)
    with ExitStack() as stack:
        copies = stack.enter_context(ready_weights(model, torch.bfloat16))
        assert sum(c.nbytes for c in copies) == expected
        assert all(c.dtype == torch.bfloat16 and not c.requires_grad for c in copies)
        stack.enter_context(pytest.raises(RuntimeError, match="step"))
        stack.enter_context(ready_weights(model, torch.bfloat16))  # nothing is left for it
        raise RuntimeError("step")
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    del copies
    gc.collect()
    assert not any(known() is not None for _, known in ready._MADE.values())


def test_models_around_the_same_weights_share_the_copies():
    one = adapted("gpt2")
    two = get_peft_model(BASES["gpt2"](), LoraConfig(r=3, target_modules="all-linear"))
    for a, b in zip(one.get_base_model().modules(), two.get_base_model().modules(), strict=True):
        for name, tensor in a._parameters.items():
            if tensor is not None and not tensor.requires_grad:
                b._parameters[name] = tensor
    with ready_weights(one, torch.bfloat16) as first, ready_weights(two, torch.bfloat16) as second:
        assert {id(c) for c in first} == {id(c) for c in second}


def test_what_reads_its_weight_or_trains_it_or_is_not_computed_is_left():
    dora = adapted("bert", use_dora=True)
    with ready_weights(dora, torch.bfloat16):
        for layer in dora.adapters.layers.values():
            assert all(p.dtype == torch.float32 for p in layer.parameters())
    lora = adapted("bert", modules_to_save=["classifier"])
    block = lora.get_base_model().bert.encoder.layer[0]
    with ready_weights(lora, torch.bfloat16, without=[block]) as copies:
        assert copies
        assert all(p.dtype == torch.float32 for p in block.parameters())
        assert all(p.dtype == torch.float32 for p in lora.parameters() if p.requires_grad)
        assert all(m.weight.dtype == torch.float32 for m in lora.modules() if isinstance(m, torch.nn.LayerNorm))
    assert ready_bytes(lora, torch.float32) == 0


def test_t35_a_run_says_whether_weights_are_held_ready(places, tmp_path, monkeypatch):  # noqa: F811
    def notes(name, **memory):
        run = prepared(places, tmp_path / name, epochs=1, precision="bf16")
        for key, value in memory.items():
            setattr(run.recipe.memory, key, value)
        made = run.execute()
        weights = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
        return " ".join(made["train"]["notes"]), weights, made["test"]

    said, weights, test = notes("ready")
    assert "frozen weights are held in bf16, not cast in every step" in said
    unsaid, others, other_test = notes("limited", limit="11GB")
    assert "held in bf16" not in unsaid
    assert test == other_test
    assert all(torch.equal(others[name], weight) for name, weight in weights.items())
    monkeypatch.setattr("afina.training.fast_path.available", lambda device: 1000)
    said, _, _ = notes("full")
    assert "frozen weights are cast to bf16 in every step: copies would take" in said


def test_plans_count_the_copies(places, tmp_path):  # noqa: F811
    from afina.training.plan import planner_for
    from afina.training.recipe import DataOptions, MemoryOptions, Recipe, TrainingOptions

    model, rows = places
    recipe = Recipe(model=model, training=TrainingOptions(precision="bf16"), data=DataOptions(file=rows))
    plan = planner_for(recipe, "cpu").plan(recipe)
    run = prepared(places, tmp_path / "run", epochs=1, precision="bf16")
    expected = ready_bytes(run.model, torch.bfloat16)
    assert [moment.device.get("ready", 0) for moment in plan.moments.values()] == [0, expected, expected]
    recipe.memory = MemoryOptions(weights="fp32", gradient_checkpointing=True)
    plan = planner_for(recipe, "cpu").plan(recipe)
    assert all("ready" not in moment.device for moment in plan.moments.values())
