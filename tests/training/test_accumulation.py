"""T25: parts of a step change neither loss nor gradients, for every architecture that transformers has a classifier for."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from test_loop import fitted, prepared
from tiny_bases import save_bert, tokenizer, write_rows

SMALL = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 29, "pad_token_id": 0}
SEQ2SEQ = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 29, "decoder_ffn_dim": 29,
           "max_position_embeddings": 64, "dropout": 0.0}  # fmt: skip
CASES = {
    "BERT": lambda n: tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=n, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL)
    ),
    "Llama": lambda n: tf.LlamaForSequenceClassification(tf.LlamaConfig(vocab_size=n, **SMALL)),
    "GPT-2": lambda n: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(
            vocab_size=n, n_embd=24, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0
        )
    ),
    "OPT": lambda n: tf.OPTForSequenceClassification(
        tf.OPTConfig(
            vocab_size=n, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, ffn_dim=29, word_embed_proj_dim=24,
            max_position_embeddings=64, dropout=0.0, pad_token_id=0,
        )
    ),
    "T5": lambda n: tf.T5ForSequenceClassification(
        tf.T5Config(
            vocab_size=n, d_model=24, d_kv=12, d_ff=29, num_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0,
            eos_token_id=3, decoder_start_token_id=0,
        )
    ),
    "BART": lambda n: tf.BartForSequenceClassification(
        tf.BartConfig(vocab_size=n, pad_token_id=0, eos_token_id=3, decoder_start_token_id=3, **SEQ2SEQ)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accumulation")
    return folder, str(write_rows(folder / "rows.csv", 37))


@pytest.mark.parametrize("name", CASES)
def test_t25_parts_change_neither_loss_nor_gradients(places, tmp_path, name):
    """Plain descent at a rate of one: what the weights move by is the gradient."""
    folder, rows = places
    base = save_bert(folder / name)  # for the tokenizer; its weights are replaced
    torch.manual_seed(0)
    for file in base.glob("*.safetensors"):
        file.unlink()
    CASES[name](len(tokenizer())).save_pretrained(base)
    options = {"optimizer": "sgd", "learning_rate": 1.0, "warmup": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e9,
               "epochs": 1, "batch_size": 13, "evaluate_every": 9.0,
               "method": {"name": "lora", "r": 3, "target_modules": "all-linear"}}  # fmt: skip
    losses, weights = {}, {}
    for count in (1, 2, 4, 8):
        lines = []
        run = prepared((str(base), rows), tmp_path / str(count), gradient_accumulation=count, **options)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
        _, after = fitted(run, lines.append)
        losses[count] = [line["loss"] for line in lines if "loss" in line]
        weights[count] = {n: after[n] - before[n] for n in before}
    assert 0.1 < losses[1][0] < 3
    assert any(change.abs().max() > 1e-3 for change in weights[1].values())
    for count in (2, 4, 8):
        assert losses[count] == pytest.approx(losses[1], rel=1e-4)
        for n, change in weights[1].items():
            torch.testing.assert_close(weights[count][n], change, rtol=1e-3, atol=1e-5)
