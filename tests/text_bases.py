"""Tiny bases whose tokenizers read real text: pieces of words, and bytes."""

from __future__ import annotations

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def wordpiece(texts, size=150, length=127):
    """As BERT's uncased one: lower case, no accents, a classification token in front, segments."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=length, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def bytelevel(texts, size=300, length=127):
    """As GPT-2's: bytes, spaces that belong to the next word, nothing in front and no padding token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", model_max_length=length)


def save(folder, tokenizer, *, layers=2, hidden=24, length=127, seed=0):
    """A base for the tokenizer, without a head: BERT where it puts a token in front, else GPT-2."""
    torch.manual_seed(seed)
    if tokenizer.cls_token is not None:
        config = tf.BertConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=29, max_position_embeddings=length, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.2,
        )  # fmt: skip
        model = tf.BertModel(config)
    else:
        config = tf.GPT2Config(
            vocab_size=len(tokenizer), n_embd=hidden, n_layer=layers, n_head=2, n_positions=length, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, classifier_dropout=0.0, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = tf.GPT2Model(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
