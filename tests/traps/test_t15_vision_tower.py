"""T15: name patterns also hit the vision tower."""

import warnings

import pytest
import torch
from trap_models import VOCAB, llama, llava, logits, trainable

from afina import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from afina.errors import TargetError

TOWER = "vision_tower"


def test_t15_the_naive_way_hits_the_tower():
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llava(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert any(TOWER in name for name in trainable(model))


@pytest.mark.parametrize("config", [LoraConfig(), IA3Config(), LNTuningConfig()], ids=lambda c: c.peft_type)
def test_t15_defaults_leave_the_tower_alone(config, tmp_path):
    model = get_peft_model(llava(), config)
    names = trainable(model)
    assert names
    assert all(".language_model." in name for name in names)
    # what is written says so by itself: PEFT and a later load adapt the same layers
    model.save_pretrained(tmp_path)
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llava(), tmp_path)
    assert not any(TOWER in n for n, _ in theirs.named_parameters() if any(k in n for k in ("lora_", "ia3_", "ln_tuning")))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*\.(q|v)_proj"], ids=str)
@pytest.mark.parametrize("scope", ["model.language_model", "model.vision_tower", "model.multi_modal_projector"])
def test_t15_targets_can_be_scoped(targets, scope):
    config = LoraConfig(target_modules=targets, target_scope=[scope])
    if "projector" in scope and targets != "all-linear":
        with pytest.raises(TargetError, match="target"):
            get_peft_model(llava(), config)
        return
    names = list(trainable(get_peft_model(llava(), config)))
    assert names
    assert all(name.startswith(f"base_model.model.{scope}.") for name in names)


def test_t15_the_report_previews_what_is_hit():
    model = get_peft_model(llava(), LoraConfig(target_modules=["q_proj"]))
    report = {line.split()[0]: line for line in model.adapter_report().splitlines()}
    hit = [pattern for pattern, line in report.items() if "LoRA" in line]
    assert any(TOWER in pattern for pattern in hit)
    assert any("language_model" in pattern for pattern in hit)
    assert "frozen" in report["model.vision_tower.encoder.layers.*.self_attn.k_proj"] or any(
        TOWER in p and "frozen" in line for p, line in report.items()
    )


def test_t15_a_text_model_has_no_scope():
    assert get_peft_model(llama(), LoraConfig()).peft_config["default"].target_modules == ["q_proj", "v_proj"]
    with pytest.raises(TargetError, match=r"target_scope entry 'model\.language_modle'") as error:
        get_peft_model(llava(), LoraConfig(target_scope=["model.language_modle"]))
    assert "'model.language_model'" in str(error.value)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_t15_prompts_go_into_the_language_model(config):
    """With a picture in the input, only what the language model sees changes."""
    base = llava()
    ids = torch.tensor([[5, 96, 96, 96, 96, 9, 11]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 14, 14), "attention_mask": torch.ones_like(ids)}
    plain = logits(base, **inputs)
    model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert not any(TOWER in name for name in trainable(model))
    got = logits(model, **inputs)
    assert got.shape[-1] == VOCAB
    assert not torch.allclose(got[:, -7:], plain)
