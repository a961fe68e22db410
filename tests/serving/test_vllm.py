"""What vLLM would refuse is known from the run's folder, each with what to do instead."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

from afina.core.files import write_weights
from afina.errors import CheckpointError, ConfigError
from afina.export.vllm import RANKS, command, refusals

PLAIN = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "bias": "none", "modules_to_save": None,
    "use_dora": False, "init_lora_weights": True, "base_model_name_or_path": "org/base",
}  # fmt: skip
KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def folder(path, shapes=None, model_type="llama", template=None, **changes):
    adapter = path / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({**PLAIN, **changes}))
    (adapter / "afina.json").write_text(json.dumps({"base": {"model_type": model_type}}))
    shapes = {f"{KEY}.lora_A.weight": (8, 5), f"{KEY}.lora_B.weight": (7, 8), **(shapes or {})}
    write_weights(adapter / "adapter_model.safetensors", {k: torch.zeros(s) for k, s in shapes.items()}, {})
    if template:
        (adapter / "chat_template.jinja").write_text(template)
    return path


REFUSED = {
    "another method": ({"peft_type": "IA3"}, "peft_type is IA3", "merged"),
    "a prompt": ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING", "afina serve"),
    "tags": ({"task_type": "TOKEN_CLS"}, "tags words", "afina serve"),
    "an encoder and a decoder": ({"task_type": "SEQ_2_SEQ_LM"}, "a decoder", "afina serve"),
    "classes": ({"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, "53555", "afina serve"),
    "vectors": ({"task_type": "FEATURE_EXTRACTION"}, "pool", "afina serve"),
    "GPT-2": ({"model_type": "gpt2"}, "type gpt2", "merged"),
    "DoRA": ({"use_dora": True}, "no DoRA", "merged"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only'", "bias: none"),
    "LoRA's biases": ({"lora_bias": True}, "lora_bias", "train without"),
    "an embedding trained whole": ({"modules_to_save": ["embed_tokens"]}, "['embed_tokens']", "merged"),
    "too high a rank": ({"r": 513}, "513", "merged"),
    "too high a rank of one layer": ({"rank_pattern": {"q_proj": 600}}, "600", "merged"),
    "scales of layers": ({"alpha_pattern": {"q_proj": 3}}, "too strongly", "one rank and alpha"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "'pissa'", "merged"),
    "trained tokens": ({"trainable_token_indices": [3]}, "trained tokens", "merged"),
    "experts": ({"target_parameters": ["experts.gate_up_proj"]}, "experts", "merged"),
    "new tokens": ({"shapes": {"base_model.model.model.embed_tokens.weight": (11, 5)}}, "new tokens", "merged"),
    "a norm": ({"shapes": {"base_model.model.model.norm.weight": (5,)}}, "no LoRA (base_model.model.model.norm", "merged"),
    "a convolution": ({"shapes": {"base_model.model.conv.lora_A.weight": (8, 5, 3, 3)}}, "convolutions", "merged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal_names_its_cause_and_its_cure(tmp_path, name):
    changes, cause, cure = REFUSED[name]
    found = refusals(folder(tmp_path / "run", **changes))
    assert any(cause in line and cure in line for line in found), found
    with pytest.raises(ConfigError, match="vLLM"):
        command({"run": tmp_path / "run"})


@pytest.mark.parametrize("changes", [
    {}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"r": 512},
    {"shapes": {"base_model.model.model.embed_tokens.lora_embedding_A": (8, 11)}},
])  # fmt: skip
def test_what_vllm_takes_is_not_refused(tmp_path, changes):
    assert refusals(folder(tmp_path / "run", **changes)) == []


def test_the_command_serves_all_runs_of_one_base(tmp_path):
    runs = {f"name {i}": folder(tmp_path / f"a run {i}", r=r) for i, r in enumerate((3, 17))}
    words = shlex.split(command(runs, "0.0.0.0", 9000))
    assert words[:3] == ["vllm", "serve", "org/base"]
    assert f"name 1={(tmp_path / 'a run 1' / 'adapter').resolve()}" in words
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert words[words.index("--max-loras") + 1] == "2"
    assert words[words.index("--port") + 1] == "9000"
    assert "--chat-template" not in words
    assert sorted(RANKS) == list(RANKS)


def test_several_bases_or_templates_need_several_servers(tmp_path):
    one = folder(tmp_path / "one", template="a")
    other = folder(tmp_path / "other", template="b", base_model_name_or_path="x")
    with pytest.raises(ConfigError, match="2 problems") as caught:
        command({"one": one, "other": other})
    assert "one on org/base; other on x" in str(caught.value)
    assert "--chat-template" in command({"one": one})
    with pytest.raises(ConfigError, match="may hold no ="):
        command({"a=b": one})


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks adapter_config\.json and adapter_model\.safetensors"):
        refusals(tmp_path)


def test_runs_of_the_real_training(writers, encoders):
    assert refusals(writers["first"]) == []
    assert [line.split(",")[0] for line in refusals(writers["second"])] == ["peft_type is IA3"]
    assert "afina serve" in refusals(writers["source"])[0]
    for name, run in encoders.items():
        assert refusals(run), name
    assert "--lora-modules" in command({"first": writers["first"]})
