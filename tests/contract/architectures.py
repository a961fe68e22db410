"""Small random models of the architectures afina is tested on, with an input that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

COMMON: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def ids(rows: int = 3, length: int = 7, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def bert() -> Any:
    return t.BertForSequenceClassification(
        t.BertConfig(
            **COMMON, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, num_labels=3
        )
    )


def gpt2() -> Any:
    return t.GPT2LMHeadModel(t.GPT2Config(**COMMON, n_embd=24, n_layer=2, n_head=3, n_positions=64))


def opt() -> Any:
    config = t.OPTConfig(
        **COMMON, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, ffn_dim=40, word_embed_proj_dim=24,
        max_position_embeddings=64,
    )  # fmt: skip
    return t.OPTForCausalLM(config)


def llama() -> Any:
    config = t.LlamaConfig(
        **COMMON, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=40
    )
    return t.LlamaForCausalLM(config)


def mixtral() -> Any:
    config = t.MixtralConfig(
        **COMMON, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=20,
        num_local_experts=3,
    )  # fmt: skip
    return t.MixtralForCausalLM(config)


def t5() -> Any:
    config = t.T5Config(
        vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = t.BartConfig(
        **COMMON, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=40, decoder_ffn_dim=40, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return t.BartForConditionalGeneration(config)


def vit() -> Any:
    config = t.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return t.ViTForImageClassification(config)


def mobilenet() -> Any:
    return t.MobileNetV2ForImageClassification(
        t.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=3, finegrained_output=False)
    )


def whisper() -> Any:
    config = t.WhisperConfig(
        vocab_size=61, num_mel_bins=5, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40, max_source_positions=8, max_target_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return t.WhisperForConditionalGeneration(config)


def text(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": ids(), "attention_mask": torch.ones(3, 7, dtype=torch.long), **more}


def picture(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "pixel_values": torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)),
        "labels": torch.tensor([0, 2, 1]),
    }


def speech() -> dict[str, Any]:
    features = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "labels": ids(3, 5, 1)}


ARCHITECTURES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], str | None]] = {
    "bert": (bert, text(labels=torch.tensor([0, 2, 1])), "SEQ_CLS"),
    "gpt2": (gpt2, text(labels=ids()), "CAUSAL_LM"),
    "opt": (opt, text(labels=ids()), "CAUSAL_LM"),
    "llama": (llama, text(labels=ids()), "CAUSAL_LM"),
    "mixtral": (mixtral, text(labels=ids()), "CAUSAL_LM"),
    "t5": (t5, text(labels=ids(3, 5, 1)), "SEQ_2_SEQ_LM"),
    "bart": (bart, text(labels=ids(3, 5, 1)), "SEQ_2_SEQ_LM"),
    "vit": (vit, picture(8), None),
    "mobilenet": (mobilenet, picture(32), None),
    "whisper": (whisper, speech, None),
}


def build(name: str, seed: int = 0) -> tuple[Any, dict[str, Any], str | None]:
    """A model in eval mode with noisy parameters, an input with labels, and the task."""
    make, inputs, task = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, inputs(), task
