"""Tiny random models of the architectures PEFT is compared on, with awkward shapes and one batch each.

`build(name)` gives the same weights at every call; `batch(name)` a padded batch with labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB, ROWS, TOKENS = 53, 3, 7


class ConvNet(nn.Module):
    """A convolutional classifier with a 1-d and two 2-d convolutions (stride, padding), and a grouped one on request."""

    def __init__(self, groups: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, kernel_size=(3, 2), stride=2, padding=1)
        self.conv2 = nn.Conv2d(10, 14, kernel_size=3, padding=(1, 0), groups=groups, bias=False)
        self.seq = nn.Conv1d(14, 5, kernel_size=3, stride=2, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = torch.relu(self.conv1(pixel_values))
        x = torch.relu(self.conv2(x))
        x = torch.relu(self.seq(x.flatten(2)))
        logits = self.head(x.mean(-1))
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = nn.functional.cross_entropy(logits, labels)
        return out


def _bert(cls: Any, labels: int = 3) -> nn.Module:
    return cls(
        tf.BertConfig(
            vocab_size=VOCAB, hidden_size=20, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
            max_position_embeddings=41, num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            classifier_dropout=0.0,
        )
    )  # fmt: skip


def _gpt2(cls: Any = tf.GPT2LMHeadModel, **options: Any) -> nn.Module:
    return cls(
        tf.GPT2Config(
            vocab_size=VOCAB, n_positions=41, n_embd=20, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_labels=3, **options,
        )
    )  # fmt: skip


def _llama(cls: Any = tf.LlamaForCausalLM, **options: Any) -> nn.Module:
    return cls(
        tf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            num_labels=3, **options,
        )
    )  # fmt: skip


def _opt() -> nn.Module:
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCAB, hidden_size=20, ffn_dim=37, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=41, word_embed_proj_dim=20, dropout=0.0, attention_dropout=0.0, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCAB, d_model=20, d_kv=5, d_ff=37, num_layers=2, num_decoder_layers=2, num_heads=4,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        )
    )  # fmt: skip


def _bart() -> nn.Module:
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=VOCAB, d_model=20, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, max_position_embeddings=41, dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=None,
        )
    )  # fmt: skip


def _vit() -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=20, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, image_size=10, patch_size=5,
            num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _whisper() -> nn.Module:
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=VOCAB, num_mel_bins=11, d_model=20, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, max_source_positions=9,
            max_target_positions=29, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


def _moe(config: Any, model: Any, **options: Any) -> nn.Module:
    return model(
        config(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=4, num_experts_per_tok=2, max_position_embeddings=64, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, **options,
        )
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: _bert(tf.BertForSequenceClassification),
    "bert-tok": lambda: _bert(tf.BertForTokenClassification),
    "bert-qa": lambda: _bert(tf.BertForQuestionAnswering, labels=2),
    "gpt2": _gpt2,
    "gpt2-cls": lambda: _gpt2(tf.GPT2ForSequenceClassification),
    "opt": _opt,
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-cls": lambda: _llama(tf.LlamaForSequenceClassification),
    "t5": _t5,
    "bart": _bart,
    "vit": _vit,
    "whisper": _whisper,
    "mixtral": lambda: _moe(tf.MixtralConfig, tf.MixtralForCausalLM, num_local_experts=5),
    "qwen3moe": lambda: _moe(
        tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM, num_experts=5, moe_intermediate_size=12, decoder_sparse_step=1
    ),
    "conv": ConvNet,
    "conv-grouped": lambda: ConvNet(groups=2),
}
TASK = {
    "bert": "SEQ_CLS", "bert-tok": "TOKEN_CLS", "bert-qa": "QUESTION_ANS", "gpt2": "CAUSAL_LM", "gpt2-cls": "SEQ_CLS",
    "opt": "CAUSAL_LM", "llama": "CAUSAL_LM", "llama-tied": "CAUSAL_LM", "llama-cls": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM", "mixtral": "CAUSAL_LM", "qwen3moe": "CAUSAL_LM",
}  # fmt: skip


def build(name: str) -> Any:
    """The model called `name`, with the same random weights at every call; larger than transformers' own
    initialisation, so that outputs differ visibly."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name) + 97)
        model = BUILDERS[name]()
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.dim() > 1:
                    p.normal_(std=0.25)
                elif "bias" in n:
                    p.normal_(std=0.1)
    return model.eval()


def batch(name: str, *, padded: bool = True) -> dict[str, torch.Tensor]:
    """Inputs and labels; text is padded on the right by pad_token_id 0 with a mask."""
    g = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 3, (ROWS,), generator=g)
    if name == "vit":
        return {"pixel_values": torch.randn(ROWS, 3, 10, 10, generator=g), "labels": labels}
    if name.startswith("conv"):
        return {"pixel_values": torch.randn(ROWS, 3, 11, 13, generator=g), "labels": labels}
    if name == "whisper":
        text = torch.randint(3, VOCAB, (ROWS, 5), generator=g)
        return {"input_features": torch.randn(ROWS, 11, 18, generator=g), "labels": text}
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -2:] = 0
        ids[1, -2:] = 0
    data = {"input_ids": ids, "attention_mask": mask}
    task = TASK[name]
    if task == "SEQ_CLS":
        data["labels"] = labels
    elif task == "TOKEN_CLS":
        data["labels"] = torch.randint(0, 3, (ROWS, TOKENS), generator=g)
    elif task == "QUESTION_ANS":
        data["start_positions"], data["end_positions"] = torch.tensor([1, 0, 2]), torch.tensor([3, 2, 2])
    elif task == "SEQ_2_SEQ_LM":
        data["labels"] = torch.randint(3, VOCAB, (ROWS, 5), generator=g)
    else:
        data["labels"] = torch.where(mask == 1, ids, -100)
    return data
