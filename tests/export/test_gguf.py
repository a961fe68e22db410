"""GGUF: what transformers reads back answers as the run, tokens and ends are those of the run."""

from __future__ import annotations

import json

import language_bases
import numpy as np
import pytest
import torch
import transformers as tf
from runs_made import STORIES, exported, language_run

from afina.errors import ConfigError
from afina.export.exporting import verify
from afina.export.format import Settings, Source
from afina.export.gguf import FILE, Gguf, architecture_of, read_tokenizer
from afina.export.golden import read_golden
from afina.tasks.catalogue import find_task

COMMON = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 29,
    "max_position_embeddings": 127, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "mistral": tf.MistralConfig(**COMMON, head_dim=6, sliding_window=None),
    "qwen2": tf.Qwen2Config(**COMMON),
    "qwen3": tf.Qwen3Config(**{**COMMON, "head_dim": 128}),  # the width transformers takes, whatever the file says
    "phi3": tf.Phi3Config(**COMMON, pad_token_id=0),
    "gemma2": tf.Gemma2Config(**{**COMMON, "tie_word_embeddings": True}, head_dim=6, query_pre_attn_scalar=256),
    "starcoder2": tf.Starcoder2Config(**{**COMMON, "tie_word_embeddings": True}, use_bias=True),
}
kinds = pytest.mark.parametrize("name", CONFIGS)


def written(config, folder, quantisation="f32"):
    """A random model with a tokenizer of bytes, and its GGUF as it is read back."""
    made = language_bases.gpt2_like()
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(made), made.bos_token_id, made.eos_token_id
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # ones would hide that a one is added
    model.save_pretrained(folder / "merged")
    made.save_pretrained(folder / "merged")
    task = find_task("causal_lm")(made, None, {"form": "answers"})
    (folder / "out").mkdir()
    Gguf().write(Source(folder / "merged", folder / "run", task, Settings(quantisation=quantisation)), folder / "out")
    return model, Gguf().load(folder / "out", task)


@kinds
def test_architectures_are_read_back_by_transformers(name, tmp_path):
    model, back = written(CONFIGS[name], tmp_path)
    ids = torch.randint(0, model.config.vocab_size, (3, 17))
    with torch.no_grad():
        torch.testing.assert_close(back(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_an_architecture_that_is_not_covered_says_so():
    with pytest.raises(ConfigError, match=r"opt cannot be written; those of llama.*--format merged"):
        architecture_of(tf.OPTConfig())


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_a_run(exports, name):
    done = exports(name, "gguf", quantisation="f32")
    assert done.replay.largest < 1e-4
    assert done.replay.same_text == done.replay.texts > 0
    golden, made = read_golden(done.folder), read_tokenizer(done.folder / FILE)
    assert made.chat_template == golden["chat_template"]
    assert golden["chat_template"]
    assert Gguf().stops(Gguf().load(done.folder, None)) == list(golden["stop_tokens"].values())
    verify(done.folder)


def test_fewer_bits_are_measured(exports):
    done = exports("Llama", "gguf", quantisation="q8_0")
    assert 0 < done.replay.mean < 0.03
    assert "loss" in done.figures
    with pytest.raises(ConfigError, match="Did you mean 'q8_0'"):
        Gguf().check(find_task("causal_lm")(language_bases.llama_like()), tf.LlamaConfig(), Settings(quantisation="q80"))


@pytest.mark.parametrize("make", [language_bases.llama_like, language_bases.gpt2_like], ids=["llama", "gpt2"])
def test_texts_are_split_as_before(make, tmp_path):
    import gguf

    from afina.export.gguf import add_tokenizer

    own = make()
    own.chat_template = "{{ messages }}"
    writer = gguf.GGUFWriter(tmp_path / FILE, "llama")
    add_tokenizer(writer, own, len(own) + 3, [own.eos_token_id, own.convert_tokens_to_ids("<|im_end|>")])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    back = read_tokenizer(tmp_path / FILE)
    for text in (*language_bases.SENTENCES, "  two", "é ∑ 🙂\n\n", "<|im_start|>user\nhi<|im_end|>", "", " "):
        assert back(text)["input_ids"] == own(text)["input_ids"], text
        assert back.decode(own(text)["input_ids"]) == own.decode(own(text)["input_ids"])
    assert back.chat_template == own.chat_template


def test_tokenizers_that_llama_cpp_lacks_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="WordLevel"):
        exported(runs("causal_lm"), "gguf", tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/data/models/stories260K-llama is absent")
def test_a_real_llama(tmp_path):
    """Grouped queries and trained weights: a wrong order of rows would change every answer."""
    run = language_run(STORIES, tmp_path / "made")
    done = exported(run, "gguf", tmp_path / "gguf", quantisation="f32")
    assert done.replay.largest < 1e-4
    both = exported(run, "gguf-adapter", tmp_path / "adapter")
    assert both.replay.largest < 1e-4
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    golden = json.loads((tmp_path / "gguf" / "golden.json").read_text(encoding="utf-8"))
    model = llama_cpp.Llama(str(tmp_path / "gguf" / FILE), n_ctx=0, logits_all=True, verbose=False)
    for prompt in golden["prompts"]:
        (ids,), (targets,) = prompt["run"]["tokens"][0], prompt["run"]["outputs"]
        model.reset()
        model.eval(ids)
        logits = torch.from_numpy(np.array(model.scores[: len(ids)]))
        places = range(len(ids) - len(targets) - 1, len(ids) - 1)
        found = torch.softmax(logits.double(), dim=-1)[places, ids[-len(targets) :]]
        assert float((found - torch.tensor(targets)).abs().max()) < 5e-3  # its cache is in 16 bits


# --- adapters


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2"])
def test_an_adapter(architecture, tmp_path):
    """Scalings that llama.cpp does not know (rsLoRA, ranks of their own) are in the factors."""
    one, other = ("q_proj", "v_proj") if architecture == "Llama" else ("c_fc", "c_attn")
    made = {"use_rslora": True, "rank_pattern": {one: 5}, "alpha_pattern": {other: 3}}
    run = language_run(architecture, tmp_path / "made", **made)
    done = exported(run, "gguf-adapter", tmp_path / "out")
    assert done.replay.largest < 1e-4
    assert done.replay.same_text == done.replay.texts > 0
    verify(done.folder)
    import gguf

    reader = gguf.GGUFReader(done.folder / "adapter.gguf")
    said = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert said == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    names = {tensor.name for tensor in reader.tensors}
    first = "blk.0.attn_q.weight" if architecture == "Llama" else "blk.0.ffn_up.weight"
    assert {f"{first}.lora_a", f"{first}.lora_b"} < names


def test_what_is_no_plain_lora_is_refused_by_name(tmp_path):
    run = language_run("Llama", tmp_path / "made", use_dora=True)
    with pytest.raises(ConfigError, match=r"(?s)q_proj: DoRA is not a LoRA.*more are like that.*--format gguf"):
        exported(run, "gguf-adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
