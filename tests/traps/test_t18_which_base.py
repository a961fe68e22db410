"""T18: a merge on the pristine 16-bit base of an adapter trained on the quantised one: both offered, difference shown."""

import logging

import pytest
import torch
import transformers as tf
from test_t17_rounded_away import adapted, batches

from afina.core.merge_error import compared
from afina.errors import BaseMismatchError

STORAGES = ["int8", "nf4", "int8_weight_only"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.mark.parametrize("storage", STORAGES)
def test_t18_on_the_values_it_was_trained_on_the_answers_stay(storage, folder, tmp_path, caplog):
    model, inputs = adapted(folder, storage), batches()
    with torch.no_grad():
        want = model(**inputs[0]).logits
    with caplog.at_level(logging.WARNING, logger="afina"):
        merged = model.merge_and_unload(base="dequantised", batches=inputs)
    assert "beside the model as it was trained: error 0.00%" in caplog.text
    with torch.no_grad():
        assert torch.allclose(merged(**inputs[0]).logits, want, rtol=1e-4, atol=1e-4)
    assert {type(m).__name__ for m in merged.modules() if isinstance(m, torch.nn.Linear)} == {"Linear"}
    merged.save_pretrained(tmp_path)  # a plain checkpoint that anyone can read
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(again.config, "quantization_config", None) is None
    with torch.no_grad():
        assert torch.allclose(again(**inputs[0]).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", STORAGES)
def test_t18_on_the_pristine_base_it_is_merged_too_and_the_difference_is_shown(storage, folder, caplog):
    model, inputs = adapted(folder, storage), batches()
    with caplog.at_level(logging.WARNING, logger="afina"):
        merged = model.merge_and_unload(base=str(folder), batches=inputs)
    said = compared(merged, model, inputs)
    assert f"base={folder}, beside the model as it was trained: error {said.error:.2%}" in caplog.text
    assert 1e-4 < said.error < (0.02 if "int8" in storage else 0.5)
    plain = adapted(folder, "fp32")  # the same adapter on the pristine base
    assert compared(merged, plain, inputs).error < 1e-5
    assert model.adapters.configs  # the quantised model keeps its adapters


def test_t18_another_base_is_refused(folder, tmp_path):
    model = adapted(folder, "nf4")
    torch.manual_seed(5)
    other = tf.AutoModelForCausalLM.from_config(
        model.config.__class__(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    )
    with pytest.raises(BaseMismatchError):
        model.merge_and_unload(base=other)


@pytest.mark.parametrize("storage", STORAGES)
def test_t18_a_transposed_layer_is_one_again(storage, tmp_path):
    """GPT-2 holds weights as `[in, out]`; what is merged of a quantised one is a checkpoint of GPT-2, square layers too."""
    from afina import LoraConfig, get_peft_model
    from afina.memory.storage import Storage

    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    tf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    base, _ = Storage(storage).load(tf.AutoModelForCausalLM, str(tmp_path / "base"))
    options = {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": False, "r": 3}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    ids = torch.randint(0, 97, (3, 7))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        merged = model.merge_and_unload(base="dequantised")
        merged.save_pretrained(tmp_path / "merged")
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        for one in (merged, again.eval()):
            torch.testing.assert_close(one(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
