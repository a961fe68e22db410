"""T33: preparing a quantised base upcasts embeddings and head, and takes more memory than before."""

import warnings

import pytest
import torch
import transformers as tf
from trap_models import ids, llama, trainable

from afina import LoraConfig, get_peft_model, prepare_model_for_kbit_training

pytest.importorskip("bitsandbytes")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 997}


def quantised(folder, bits, dtype=torch.bfloat16, **options):
    llama(**WIDE, **options).to(dtype).save_pretrained(folder)
    config = tf.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=dtype)
    return tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=dtype)


def storage(model):
    """Bytes and dtypes of everything the model holds, each storage once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values()), {n: t.dtype for n, t in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_t33_preparing_takes_no_memory(bits, tied, checkpointing, tmp_path):
    model = quantised(tmp_path, bits, tie_word_embeddings=tied)
    before = storage(model)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    assert prepared is model
    assert storage(model) == before
    assert trainable(model) == []
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == checkpointing
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    added = sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    assert storage(adapted)[0] == before[0] + added
    assert {p.dtype for n, p in adapted.named_parameters() if ".adapters." in n} == {torch.float32}
    assert adapted.get_input_embeddings().weight.dtype == torch.bfloat16


def test_t33_the_naive_way_takes_more(tmp_path):
    import peft

    model = quantised(tmp_path, 4)
    before = storage(model)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert storage(model)[0] > 1.3 * before


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_t33_the_prepared_model_trains(bits, reentrant, tmp_path):
    model = prepare_model_for_kbit_training(
        quantised(tmp_path, bits), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear"))
    model.train()
    batch = ids(3, 9)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
