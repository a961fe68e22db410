"""T7: a requested target that matches nothing, or is dropped, passes unnoticed."""

import warnings

import pytest
from trap_models import bert, gpt2, llama, trainable, vit

from afina import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from afina.core.injection import AdapterSet
from afina.errors import AfinaError, ConfigError, TargetError


def refused(model, config, error=TargetError):
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error) as caught:
        get_peft_model(model, config)
    assert [p.requires_grad for p in model.parameters()] == flags  # nothing has been changed
    assert not any(".adapters." in name for name, _ in model.named_parameters())
    assert AdapterSet.of(model) is None  # and the model can be adapted, once the configuration is right
    return str(caught.value)


def test_t07_the_naive_way_passes_it_over():
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_porj"]))
    assert not any("v_proj" in name for name in trainable(model))


def test_t07_an_entry_that_matches_nothing_names_the_nearest():
    text = refused(llama(), LoraConfig(target_modules=["q_proj", "v_porj"]))
    assert "target_modules" in text
    assert "'v_porj'" in text
    assert "Did you mean 'v_proj'" in text
    assert "q_proj' matches" not in text


def test_t07_all_that_is_wrong_is_said_at_once():
    config = LoraConfig(
        target_modules=["qproj", "layers.0.self_attn.vproj"], modules_to_save=["lm_haed"], exclude_modules=["o_porj"],
        rank_pattern={"kproj": 4}, target_scope=["modle"],
    )  # fmt: skip
    text = refused(llama(), config)
    for typed, near in (("qproj", "q_proj"), ("layers.0.self_attn.vproj", "model.layers.0.self_attn.v_proj"),
                        ("lm_haed", "lm_head"), ("o_porj", "o_proj"), ("modle", "model")):  # fmt: skip
        assert f"'{typed}'" in text, typed
        assert f"'{near}'" in text, near
    text = refused(llama(), LoraConfig(target_modules=["q_proj"], rank_pattern={"kproj": 4}, alpha_pattern={"vproj": 3}))
    assert "2 problems" in text
    assert "rank_pattern" in text
    assert "'kproj'" in text
    assert "alpha_pattern" in text


def test_t07_everything_excluded():
    text = refused(llama(), LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]))
    assert "excluded" in text
    assert "nothing would be trained" in text
    text = refused(llama(), LoraConfig(target_modules=["q_proj"], exclude_modules=r".*\.self_attn\..*"))
    assert "excluded" in text
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"]))
    assert list(model.adapters.layers) == ["model.layers.1.self_attn.q_proj"]


def test_t07_an_exclusion_that_matches_nothing():
    text = refused(llama(), LoraConfig(target_modules="all-linear", exclude_modules=["down_porj"]))
    assert "exclude_modules" in text
    assert "'down_porj'" in text
    assert "'down_proj'" in text
    text = refused(llama(), LoraConfig(target_modules="all-linear", exclude_modules=r"down_proj"))
    assert "exclude_modules='down_proj'" in text
    assert "whole name" in text
    # one that names modules which are no targets changes nothing and is fine
    assert get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], exclude_modules=["down_proj"]))


def test_t07_blocks_out_of_range():
    text = refused(llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2, 7]))
    assert "layers_to_transform has 2" in text
    assert "layers_to_transform has 7" in text
    assert "blocks 0, 1" in text
    text = refused(llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="h"))
    assert "layers_pattern" in text
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"))
    assert list(model.adapters.layers) == ["model.layers.1.self_attn.q_proj"]


def test_t07_blocks_of_modules_outside_of_blocks_as_peft():
    import peft

    options = {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}
    own = get_peft_model(llama(), LoraConfig(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options))
    adapted = {n.removeprefix("base_model.model.").split(".lora_")[0] for n, _ in theirs.named_parameters() if ".lora_" in n}
    assert set(own.adapters.layers) == adapted == {"model.layers.0.self_attn.q_proj", "lm_head"}


def test_t07_an_entry_that_lies_in_no_block():
    text = refused(llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"], layers_to_transform=[0]))
    assert "'embed_tokens'" in text
    assert "lies in no block" in text
    assert "'model.embed_tokens'" in text
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "model.embed_tokens"], layers_to_transform=[0]))
    assert set(model.adapters.layers) == {"model.layers.0.self_attn.q_proj", "model.embed_tokens"}


def test_t07_a_regular_expression_that_matches_nothing():
    text = refused(llama(), LoraConfig(target_modules="q_proj"))
    assert "target_modules='q_proj'" in text
    assert "whole name" in text
    assert "model.layers.0.self_attn.q_proj" in text
    assert get_peft_model(llama(), LoraConfig(target_modules=r".*\.q_proj"))
    with pytest.raises(ConfigError, match=r"target_modules='\*q_proj' is not a regular expression"):
        LoraConfig(target_modules="*q_proj")


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=[]), LNTuningConfig(target_modules=[])], ids=lambda c: c.peft_type
)
def test_t07_no_target_at_all(config):
    text = refused(llama(), config)
    assert "target_modules" in text
    assert "nothing" in text
    tokens = LoraConfig(target_modules=[], trainable_token_indices=[3])
    assert trainable(get_peft_model(llama(), tokens))


def test_t07_a_target_that_a_scope_drops():
    text = refused(llama(), LoraConfig(target_modules=["q_proj", "lm_head"], target_scope=["model"]))
    assert "'lm_head'" in text
    assert "target_scope" in text
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], target_scope=["model.layers.1"]))
    assert list(model.adapters.layers) == ["model.layers.1.self_attn.q_proj"]


def test_t07_a_layer_of_a_kind_the_method_cannot_adapt():
    text = refused(bert(), IA3Config(target_modules=["key", "LayerNorm"], feedforward_modules=[]))
    assert "bert.embeddings.LayerNorm is a LayerNorm" in text
    assert "kind" in text
    text = refused(gpt2(), LoraConfig(target_modules=["attn"]))
    assert "GPT2Attention" in text


def test_t07_feedforward_modules_that_match_nothing():
    with pytest.raises(ConfigError, match=r"feedforward_modules has \['down_porj'\]"):
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_porj"])


def test_t07_no_default_is_an_error_and_not_a_guess():
    import torch

    model = torch.nn.ModuleDict({"a": torch.nn.ReLU()})
    with pytest.raises(AfinaError, match="target_modules"):
        AdapterSet(model).add("default", LoraConfig())
    assert get_peft_model(vit(), LoraConfig())
