"""Tiny random models for the tests of known traps: sizes are awkward on purpose, seeds are fixed."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

VOCAB = 97


def llama(cls: Any = tf.LlamaForCausalLM, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64, "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | options  # fmt: skip
    return cls(tf.LlamaConfig(**settings)).eval()


def gpt2(cls: Any = tf.GPT2LMHeadModel, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64, "pad_token_id": 0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    } | options  # fmt: skip
    return cls(tf.GPT2Config(**settings)).eval()


def opt(cls: Any = tf.OPTForCausalLM, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 37, "num_hidden_layers": 2,
        "num_attention_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "dropout": 0.0,
    } | options  # fmt: skip
    return cls(tf.OPTConfig(**settings)).eval()


def bert(cls: Any = tf.BertForSequenceClassification, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
    } | options  # fmt: skip
    return cls(tf.BertConfig(**settings)).eval()


def t5(cls: Any = tf.T5ForConditionalGeneration, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB, "d_model": 24, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 3, "dropout_rate": 0.0,
        "pad_token_id": 0, "decoder_start_token_id": 0, "tie_word_embeddings": True,
    } | options  # fmt: skip
    return cls(tf.T5Config(**settings)).eval()


def vit(cls: Any = tf.ViTForImageClassification, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 14,
        "patch_size": 7, "num_labels": 3,
    } | options  # fmt: skip
    return cls(tf.ViTConfig(**settings)).eval()


def llava(*, seed: int = 0, vision_layers: int = 3) -> Any:
    """A vision tower (CLIP, whose attention names are those of Llama), a projector and a Llama."""
    torch.manual_seed(seed)
    vision = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=29,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=14,
        patch_size=7,
    )
    config = tf.LlavaConfig(vision_config=vision, text_config=llama().config, image_token_id=96, image_seq_length=4)
    return tf.LlavaForConditionalGeneration(config).eval()


def moe(*, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = tf.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=20, intermediate_size=37, moe_intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=10, num_experts=5, num_experts_per_tok=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return tf.Qwen3MoeForCausalLM(config).eval()


def ids(rows: int = 3, length: int = 7, seed: int = 1, low: int = 3) -> torch.Tensor:
    return torch.randint(low, VOCAB - 2, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stir(model: Any, name: str = "default", *, scale: float = 0.3, seed: int = 2) -> Any:
    """Give an adapter values that change the model's output; its parameters keep their dtype and their ties."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for adapter in model.adapters.adapters(name):
        for parameter in adapter.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return model


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    model.eval()
    inputs = inputs or {"input_ids": ids()}
    return model(**inputs).logits


@torch.no_grad()
def hidden(model: Any, **inputs: Any) -> torch.Tensor:
    model.eval()
    inputs = inputs or {"input_ids": ids()}
    return model(**inputs).last_hidden_state


def trainable(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def reload(folder: Any, model: Any) -> Any:
    """A model as transformers loads it from the checkpoint it writes."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()
