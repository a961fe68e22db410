"""Small recordings that can be told apart, and tiny models that read sound with their processors, saved as folders."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tiny_bases
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


SAID = {"high": "w1", "low": "w3"}


def write_transcripts(folder, rows=23, *, seed=0, said=()):
    """`folder/N.wav` and the list of them: two or three tones in a row and a word for each; or what is `said`, in turn."""
    soundfile = pytest.importorskip("soundfile")
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,transcription"]
    for i in range(rows):
        kinds = chance.choices(sorted(PITCHES), k=chance.randrange(2, 4))
        tones = [sound(kind, chance, least=0.12, most=0.16) for kind in kinds]
        soundfile.write(folder / f"{i}.wav", np.concatenate(tones), 8000)
        text = said[i % len(said)] if said else " ".join(SAID[kind] for kind in kinds)
        lines.append(f'{i}.wav,"{text}"')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "metadata.csv"


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


def save_wav2vec2_ctc(folder, norm="layer", letters=None):
    """One that writes letters; without `letters` it was trained on sound alone, and has no tokenizer."""
    torch.manual_seed(0)
    extractor = tf.Wav2Vec2FeatureExtractor(sampling_rate=4000, return_attention_mask=norm == "layer")
    if letters is None:
        return _save(folder, tf.Wav2Vec2ForPreTraining(_wav2vec2_config(norm)), extractor)
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "|", *letters]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    processor = tf.Wav2Vec2Processor(extractor, tf.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")))
    return _save(folder, tf.Wav2Vec2ForCTC(_wav2vec2_config(norm, vocab_size=len(vocabulary), pad_token_id=0)), processor)


def save_moonshine(folder):
    """One whose encoder looks over the whole length, padding and all."""
    torch.manual_seed(0)
    config = tf.MoonshineConfig(
        vocab_size=53, hidden_size=24, intermediate_size=29, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, max_position_embeddings=61,
    )  # fmt: skip
    extractor = tf.Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)
    processor = tf.Wav2Vec2Processor(extractor, tiny_bases.tokenizer(encoder=False))
    return _save(folder, tf.MoonshineForConditionalGeneration(config), processor)


def save_two_models(folder):
    """wav2vec 2.0 and GPT-2 put together: samples in, a decoder that is told nothing of languages."""
    tokenizer = tiny_bases.tokenizer(encoder=False)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    decoder = tf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=24, n_layer=1, n_head=2, n_positions=61, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.2, bos_token_id=end, eos_token_id=end, add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    config = tf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(_wav2vec2_config("layer"), decoder)
    config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = end
    extractor = tf.Wav2Vec2FeatureExtractor(sampling_rate=4000, return_attention_mask=True)
    return _save(folder, tf.SpeechEncoderDecoderModel(config), tf.Wav2Vec2Processor(extractor, tokenizer))


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


def whisper_tokenizer():
    """Letters as bytes, and Whisper's special tokens in their order."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>",
               "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip
    vocab = {token: i for i, token in enumerate([*bytes_to_unicode().values(), *special])}
    made = tf.WhisperTokenizer(vocab=vocab, merges=[], unk_token=special[0], bos_token=special[0], eos_token=special[0],
                               pad_token=special[0], extra_special_tokens=special[1:])  # fmt: skip
    return made


def save_whisper(folder, **more):
    """A Whisper that writes."""
    made = whisper_tokenizer()
    end = made.eos_token_id
    torch.manual_seed(0)
    config = whisper_config(vocab_size=len(made), pad_token_id=end, bos_token_id=end, eos_token_id=end,
                            decoder_start_token_id=end + 1, **more)  # fmt: skip
    model = tf.WhisperForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.decoder.embed_tokens.weight.data[end], std=config.init_std)  # else 0: it pads, too
    return _save(folder, model, tf.WhisperProcessor(whisper_extractor(), made))


def _save(folder, model, *processors):
    model.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return folder
