"""Finding the layers that a configuration means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, Blip2Config, Blip2ForConditionalGeneration

import afina
from afina.core.config import name_matches
from afina.core.targets import ModuleMap, compact_names, matches_any
from afina.errors import TargetError
from afina.methods.ia3 import IA3
from afina.methods.lora import LoRA

peft_constants = pytest.importorskip("peft.utils.constants", reason="peft is not installed")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers")


def on_meta(kind: str) -> ModuleMap:
    config = AutoConfig.for_model(kind)
    for name in LAYERS:
        if hasattr(config, name):
            setattr(config, name, 2)
    with torch.device("meta"):
        return ModuleMap(AutoModel.from_config(config))


@pytest.mark.parametrize(
    "kind",
    ["bart", "bert", "bloom", "codegen", "deberta", "deberta-v2", "electra", "falcon", "gpt2", "gpt_bigcode", "gpt_neo",
     "gpt_neox", "gptj", "layoutlm", "llama", "mistral", "mixtral", "mpt", "mt5", "opt", "qwen2", "qwen3", "roberta",
     "stablelm", "t5", "xlm-roberta"],
)  # fmt: skip
def test_loras_defaults_are_found_in_the_tree_as_pefts_table_has_them(kind: str) -> None:
    modules = on_meta(kind)
    table = peft_constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind]
    assert set(LoRA.default_targets(modules)) == {n for n in modules.modules if matches_any(table, n)}


@pytest.mark.parametrize("kind", ["bloom", "falcon", "gpt2", "gpt_neox", "llama", "mistral", "t5"])
def test_ia3s_defaults_are_keys_values_and_the_inside_of_the_feed_forward_layer(kind: str) -> None:
    modules = on_meta(kind)
    table = peft_constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[kind]
    assert set(IA3.default_targets(modules)) == {n for n in modules.modules if matches_any(table, n)}


def test_defaults_of_a_multimodal_model_stay_in_its_language_model() -> None:
    config = Blip2Config(
        text_config={"model_type": "opt", "num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1},
        qformer_config={"num_hidden_layers": 1},
    )  # fmt: skip
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    adapted = afina.get_peft_model(model, afina.LoraConfig()).adapters.layers
    assert adapted
    assert all(".language_model." in f".{path}" for path in adapted)


def test_compact_names_mean_exactly_the_chosen_modules() -> None:
    everything = [f"h.{i}.{part}" for i in (0, 1, 11) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    for chosen in (
        [n for n in everything if n.endswith("mlp.c_proj")],
        [n for n in everything if n.endswith("c_proj")],
        ["h.1.attn.c_attn"],
        ["h.1.mlp.c_proj", "h.11.attn.c_attn", "h.0.attn.c_attn", "h.1.attn.c_attn"],
        everything,
    ):
        entries = compact_names(chosen, everything)
        assert {n for n in everything if matches_any(entries, n)} == set(chosen)
    assert compact_names([n for n in everything if n.endswith("mlp.c_proj")], everything) == ["mlp.c_proj"]


def test_patterns_begin_at_a_name_and_reach_the_end() -> None:
    path = "model.layers.10.self_attn.q_proj"
    assert all(
        name_matches(p, path)
        for p in ("q_proj", "self_attn.q_proj", r"layers\.10\.self_attn\.q_proj", r".*q_proj", "[qk]_proj")
    )
    assert not any(name_matches(p, path) for p in ("proj", "q_pro", r"0\.self_attn\.q_proj", "model"))


def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=31, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
    )


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, 6),
        ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, 1),
        ({"target_modules": r".*\.layers\.[02]\.mlp\.(up|down)_proj"}, 4),
        ({"target_modules": "all-linear"}, 21),
        ({"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "q_proj"]}, 15),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}, 4),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, 1),
        ({"target_modules": "all-linear", "target_scope": ["model.layers.2"]}, 7),
        ({}, 6),
    ],
)
def test_selection(options: dict[str, Any], count: int) -> None:
    model = afina.get_peft_model(tiny(), afina.LoraConfig(**options))
    assert len(model.adapters.layers) == count


def test_overrides_by_pattern_are_one_mechanism() -> None:
    config = afina.LoraConfig(
        target_modules="all-linear",
        r=4,
        lora_alpha=8,
        rank_pattern={"q_proj": 2, r"layers\.1\..*": 3},
        alpha_pattern={"q_proj": 1},
    )
    layers = afina.get_peft_model(tiny(), config).adapters.layers
    found = {path: (a.r, a.scaling) for path, layer in layers.items() for a in layer.adapters.values()}
    assert found["model.layers.0.self_attn.q_proj"] == (2, 0.5)
    assert found["model.layers.1.self_attn.q_proj"] == (2, 0.5)
    assert found["model.layers.1.mlp.up_proj"] == (3, 8 / 3)
    assert found["model.layers.0.mlp.up_proj"] == (4, 2.0)


def test_a_wrong_target_of_every_kind_is_named_with_the_nearest() -> None:
    with pytest.raises(TargetError) as error:
        afina.get_peft_model(
            tiny(),
            afina.LoraConfig(
                target_modules=["q_proj", "qproj", "mlp.upproj"], modules_to_save=["lm_heads"], layers_to_transform=[0, 7],
                target_scope=["model.layer"],
            ),
        )  # fmt: skip
    text = str(error.value)
    for part in ("'qproj'", "'q_proj'", "mlp.upproj", "lm_heads", "'lm_head'"):
        assert part in text
