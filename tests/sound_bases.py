"""Small recordings that can be told apart, and tiny models that read sound with their processors, saved as folders."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers as tf

PITCHES = {"high": 900.0, "low": 300.0}


def sound(kind, chance, rate=8000, least=0.11, most=0.23):
    """A tone in some noise, of some length and loudness; no two are alike."""
    time = np.arange(int(rate * chance.uniform(least, most))) / rate
    tone = np.sin(2 * np.pi * (PITCHES[kind] * chance.uniform(0.9, 1.1) * time + chance.random()))
    noise = np.random.default_rng(chance.randrange(2**31)).standard_normal(len(time))
    return (chance.uniform(0.2, 0.6) * tone + 0.02 * noise).astype(np.float32)


def write_sounds(folder, rows=31, *, seed=0, sides=(), kinds=tuple(PITCHES), rate=8000):
    """`folder/[SIDE/]CLASS/N.wav`, rows of each class on each side."""
    soundfile = pytest.importorskip("soundfile")
    chance = random.Random(seed)
    for side in sides or ("",):
        for kind in kinds:
            place = folder / side / kind
            place.mkdir(parents=True, exist_ok=True)
            for i in range(rows):
                soundfile.write(place / f"{i}.wav", sound(kind, chance, rate), rate)
    return folder


def _wav2vec2_config(norm, **more):
    return tf.Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29, conv_dim=(16, 16, 16),
        conv_kernel=(10, 8, 4), conv_stride=(5, 4, 4), num_feat_extract_layers=3, feat_extract_norm=norm,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, classifier_proj_size=13, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, initializer_range=0.2,
        conv_bias=norm == "layer", do_stable_layer_norm=norm == "layer", **more,
    )  # fmt: skip


def save_wav2vec2(folder, norm="layer", labels=2):
    torch.manual_seed(0)
    extractor = tf.Wav2Vec2FeatureExtractor(sampling_rate=4000, return_attention_mask=norm == "layer")
    return _save(folder, tf.Wav2Vec2ForSequenceClassification(_wav2vec2_config(norm, num_labels=labels)), extractor)


def save_ast(folder):
    config = tf.ASTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29, patch_size=4,
        frequency_stride=4, time_stride=4, max_length=23, num_mel_bins=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    extractor = tf.ASTFeatureExtractor(sampling_rate=8000, num_mel_bins=16, max_length=23)
    return _save(folder, tf.ASTForAudioClassification(config), extractor)


def whisper_config(**more):
    return tf.WhisperConfig(
        **{"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 53,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 29, "decoder_ffn_dim": 29, "num_mel_bins": 16,
           "max_source_positions": 50, "max_target_positions": 61, "dropout": 0.0, "classifier_proj_size": 13,
           "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2, **more}
    )  # fmt: skip


def whisper_extractor(**more):
    return tf.WhisperFeatureExtractor(**{"feature_size": 16, "chunk_length": 1, **more})


def save_whisper_encoder(folder):
    """A whole Whisper, of which classifying reads the encoder alone."""
    torch.manual_seed(0)
    return _save(folder, tf.WhisperForConditionalGeneration(whisper_config()), whisper_extractor())


def _save(folder, model, *processors):
    model.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return folder
