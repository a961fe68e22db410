"""Small classifiers of many architectures, and a batch whose rows differ in length."""

from __future__ import annotations

import torch
import transformers as tf

N = 53
LAYERS = 3
SMALL = {"vocab_size": N, "hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 29}
GROUPED = {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0}
BASES = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SMALL, pad_token_id=0)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=N, dim=24, n_layers=LAYERS, n_heads=2, hidden_dim=29)
    ),
    "electra": lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**SMALL, embedding_size=12)),
    "deberta": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"])
    ),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(
            vocab_size=N, n_embd=24, n_layer=LAYERS, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=1
        )
    ),
    "opt": lambda: tf.OPTForSequenceClassification(
        tf.OPTConfig(
            vocab_size=N, hidden_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, ffn_dim=29,
            word_embed_proj_dim=24, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )
    ),
    "llama": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: tf.Qwen2ForSequenceClassification(tf.Qwen2Config(**GROUPED)),
    "mistral": lambda: tf.MistralForSequenceClassification(tf.MistralConfig(**GROUPED, head_dim=12)),
    "gemma2": lambda: tf.Gemma2ForSequenceClassification(tf.Gemma2Config(**GROUPED, head_dim=12)),
    "neox": lambda: tf.GPTNeoXForSequenceClassification(tf.GPTNeoXConfig(**SMALL, pad_token_id=0)),
    "bloom": lambda: tf.BloomForSequenceClassification(
        tf.BloomConfig(
            vocab_size=N, hidden_size=24, n_layer=LAYERS, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=1
        )
    ),
    "t5": lambda: tf.T5ForSequenceClassification(
        tf.T5Config(
            vocab_size=N, d_model=24, d_kv=12, d_ff=29, num_layers=LAYERS, num_heads=2, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: tf.BartForSequenceClassification(
        tf.BartConfig(
            vocab_size=N, d_model=24, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=29, decoder_ffn_dim=29, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=1, max_position_embeddings=32,
        )
    ),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    model = BASES[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        parameter.requires_grad_(False)
    return model


def rows(*, seed=0, count=5, length=13):
    """Ids that end in the token 1, and a mask, padded on the right."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, N, (count, length), generator=chance)
    lengths = torch.tensor([length, 7, 2, 11, 5])[:count]
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids[torch.arange(count), lengths - 1] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}
