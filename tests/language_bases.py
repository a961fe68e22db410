"""Tiny language models of several architectures, with tokenizers of different habits that were made from a few sentences."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from afina.tasks.catalogue import find_task

SENTENCES = [
    "### Instruction:\nWhat is the capital of Norway?\n\n### Response:\nOslo is the capital.",
    "Name seven fruits that are red, and say where they grow.",
    "Translate the sentence: 'el gos és petit' means the dog is small.",
    "user assistant system question answer\n\nthink no more of it; the quick brown fox jumps over 13 lazy dogs!",
]
CHAT = ["<|im_start|>", "<|im_end|>"]


def llama_like(*, begins=True):
    """Spaces as part of words, one put in front of every text; a begin token, and padding that is the end token."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *CHAT]
    letters = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=499, special_tokens=[*special, *letters], show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(_plain_letters(made, special), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def gpt2_like(*, begins=False):
    """Bytes; one token that begins, ends and pads."""
    made = _bytes(["<|endoftext|>", *CHAT])
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return _wrapped(made, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def t5_like():
    """Bytes; an end token behind every text, nothing in front."""
    made = _bytes(["<pad>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _wrapped(made, pad_token="<pad>", eos_token="</s>")


def bart_like():
    """Bytes; a token in front and one behind."""
    made = _bytes(["<s>", "<pad>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return _wrapped(made, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


def _bytes(special):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=359, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    return made


def _plain_letters(made, special):
    """Bytes are tokens of their own and not special ones, which would be dropped when text is decoded."""
    import json

    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(content))


def _wrapped(made, **tokens):
    chat = [token for token in CHAT if made.token_to_id(token) is not None]
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=chat, **tokens)


def save(folder, architecture, tokenizer=None, *, seed=0):
    """A folder with a model of random weights and its tokenizer."""
    made = tokenizer or TOKENIZERS[architecture]()
    torch.manual_seed(seed)
    MODELS[architecture](made).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def _ids(made):
    return {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id}


def _llama(made):
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=len(made), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=29, max_position_embeddings=127, initializer_range=0.2, **_ids(made),
        )
    )  # fmt: skip


def _gpt2(made):
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=len(made), n_embd=24, n_layer=2, n_head=2, n_positions=127, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, initializer_range=0.2, **_ids(made),
        )
    )  # fmt: skip


def _opt(made):
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=len(made), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, ffn_dim=29,
            word_embed_proj_dim=24, max_position_embeddings=127, dropout=0.0, init_std=0.2, **_ids(made),
        )
    )  # fmt: skip


def _t5(made):
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=len(made), d_model=24, d_kv=12, d_ff=29, num_layers=2, num_heads=2, dropout_rate=0.0,
            pad_token_id=made.pad_token_id, eos_token_id=made.eos_token_id, decoder_start_token_id=made.pad_token_id,
        )
    )  # fmt: skip


def _bart(made):
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=len(made), d_model=24, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=29, decoder_ffn_dim=29, max_position_embeddings=127, dropout=0.0,
            init_std=0.2, decoder_start_token_id=made.eos_token_id, forced_eos_token_id=None, **_ids(made),
        )
    )  # fmt: skip


MODELS = {"Llama": _llama, "GPT-2": _gpt2, "OPT": _opt, "T5": _t5, "BART": _bart}
TOKENIZERS = {
    "Llama": llama_like, "GPT-2": gpt2_like, "OPT": gpt2_like, "T5": t5_like, "BART": bart_like,
}  # fmt: skip
CAUSAL, SEQ2SEQ = ("Llama", "GPT-2", "OPT"), ("T5", "BART")


def rows_of(name, rows):
    """Examples of rows by role, as a file would give them."""
    kind = find_task(name).kind
    return [replace(kind.make(row, line), row=row) for line, row in enumerate(rows, 2)]


def task_of(name, tokenizer, rows=(), **options):
    """A task that has seen the rows; no model."""
    cls = find_task(name)
    return cls(tokenizer, cls.Options(**options), cls.learn(rows_of(name, rows), []) if rows else {"form": "answers"})


def features_of(task, rows, length=None, limit=127):
    """The rows as features."""
    return task.encode(rows_of(task.name, rows), length, limit)
