"""Tiny bases with tokenizers of their own, saved as folders, and a labelled file that they can learn."""

from __future__ import annotations

import csv
import random

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"w{i}" for i in range(37)]
TELLING = {"complaint": ["late", "broken", "rude"], "other": ["thanks", "hello", "when"]}


def write_rows(path, rows=97, *, seed=0, columns=("message", "label"), delimiter=","):
    """A file in which one word of each text tells the label."""
    chance = random.Random(seed)
    seen = set()
    while len(seen) < rows:
        label = chance.choice(sorted(TELLING))
        words = chance.choices(WORDS, k=chance.randrange(2, 17))
        words.insert(chance.randrange(len(words)), chance.choice(TELLING[label]))
        seen.add((" ".join(words), label))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(sorted(seen))
    return path


def tokenizer(*, encoder=True):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if encoder else ["<unk>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *(w for words in TELLING.values() for w in words)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=special[encoder if encoder else 0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if not encoder:
        return tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<|endoftext|>")
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=61,
    )


def save_bert(folder):
    made = tokenizer()
    config = tf.BertConfig(
        vocab_size=len(made), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29,
        max_position_embeddings=61, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return _save(folder, tf.BertModel(config), made)


def save_gpt2(folder):
    made = tokenizer(encoder=False)
    config = tf.GPT2Config(
        vocab_size=len(made), n_embd=24, n_layer=2, n_head=2, n_positions=61, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.2, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return _save(folder, tf.GPT2Model(config), made)


def _save(folder, model, made):
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
