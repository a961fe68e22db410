"""The counts users know from PEFT's documentation, on the architectures built from their configurations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import afina

from .cases import peft_warnings


def mt5_large(*, tied: bool) -> Any:
    """bigscience/mt0-large without weights; the released checkpoint has a head of its own."""
    config = tf.MT5Config(
        vocab_size=250112, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_decoder_layers=24, num_heads=16,
        feed_forward_proj="gated-gelu", tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.MT5ForConditionalGeneration(config)
    if tied:
        model.tie_weights()
    else:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(250112, 1024, device="meta"))
    return model


@pytest.mark.parametrize("package", [peft, afina], ids=lambda p: p.__name__)
def test_mt0_large_trains_0_19_percent(package: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = package.LoraConfig(
        task_type=package.TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    with peft_warnings():
        model = package.get_peft_model(mt5_large(tied=False), config)
    assert model.get_nb_trainable_parameters() == (2_359_296, 1_231_940_608)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out.strip()
    assert printed == "trainable params: 2,359,296 || all params: 1,231,940,608 || trainable%: 0.1915"
    with peft_warnings():
        model = package.get_peft_model(mt5_large(tied=True), copy.deepcopy(config))
    assert model.get_nb_trainable_parameters() == (2_359_296, 975_825_920)


def test_the_adapter_of_t0_3b_is_a_small_file(tmp_path: Path) -> None:
    config = tf.T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        base = tf.T5ForConditionalGeneration(config)
    model = afina.get_peft_model(base, afina.LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=32, lora_dropout=0.1))
    assert sum(p.numel() * 4 for p in base.parameters()) > 11e9
    with pytest.raises(ValueError, match="meta device"):
        model.save_pretrained(tmp_path)
    state = afina.get_peft_model_state_dict(model)
    values = {key: torch.rand(tensor.shape) for key, tensor in state.items()}
    for layer in model.adapters.layers.values():
        layer.adapters["default"].to_empty(device="cpu")
    afina.set_peft_model_state_dict(model, values)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert sum(t.numel() * 4 for t in values.values()) < size < 20e6


@pytest.mark.parametrize("package", [peft, afina], ids=lambda p: p.__name__)
def test_qwen_3b(package: Any) -> None:
    config = tf.Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        base = tf.Qwen2ForCausalLM(config)
    base.tie_weights()
    with peft_warnings():
        options = {"task_type": "CAUSAL_LM", "r": 16, "target_modules": ["q_proj", "v_proj"]}
        model = package.get_peft_model(base, package.LoraConfig(**options))
    assert model.get_nb_trainable_parameters() == (3_686_400, 3_089_625_088)
