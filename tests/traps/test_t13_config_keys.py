"""T13: configuration keys of another version crash the load, or are dropped although they mean something."""

import json
import logging

import pytest
import torch
from trap_models import llama, logits, stir

from afina import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from afina.errors import AfinaError, CheckpointError, ConfigError


@pytest.fixture
def saved(tmp_path):
    model = stir(get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model)


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("value", [None, False, {}, [], ""], ids=repr)
def test_t13_unknown_keys_that_ask_for_nothing_are_named_and_ignored(value, saved, caplog):
    folder, expected = saved
    rewrite(folder, use_tomorrow=value)
    with caplog.at_level(logging.INFO, logger="afina"):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), folder)), expected, rtol=0, atol=0)
    assert "use_tomorrow" in caplog.text


def test_t13_known_keys_of_features_afina_lacks_pass_at_their_defaults(saved):
    import peft

    folder, expected = saved
    theirs = peft.LoraConfig(r=3, target_modules=["q_proj"]).to_dict()
    lacking = {k: v for k, v in theirs.items() if k not in LoraConfig().to_dict()}
    assert "megatron_core" in lacking
    lacking.pop("peft_version")
    rewrite(folder, **{k: (v if not hasattr(v, "__dict__") else None) for k, v in lacking.items() if k != "runtime_config"})
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), folder)), expected, rtol=0, atol=0)


def test_t13_keys_that_mean_something_are_errors_told_together(saved):
    folder, _ = saved
    rewrite(folder, use_tomorrow=True, rr=5, use_qalora=True, qalora_group_size=8, peft_version="0.99.1")
    with pytest.raises(ConfigError) as error:
        PeftModel.from_pretrained(llama(), folder)
    text = str(error.value)
    for part in (
        "use_tomorrow=True",
        "rr=5",
        "Did you mean 'r'",
        "use_qalora=True",
        "qalora_group_size=8",
        "PEFT 0.99.1 knows it",
        "adapter_config.json",
    ):
        assert part in text, part
    rewrite(folder, peft_version=None)
    with pytest.raises(ConfigError, match="the version that wrote the file"):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("value", ["NOPE", "LORAA", "lora"])
def test_t13_an_unknown_method(value, saved):
    folder, _ = saved
    rewrite(folder, peft_type=value)
    with pytest.raises(ConfigError) as error:
        PeftModel.from_pretrained(llama(), folder)
    assert f"peft_type='{value}'" in str(error.value)
    if value != "NOPE":
        assert "'LORA'" in str(error.value)


def test_t13_no_method_at_all(saved):
    folder, _ = saved
    rewrite(folder, peft_type=None)
    with pytest.raises(ConfigError, match="no peft_type"):
        PeftConfig.from_pretrained(folder)


def test_t13_values_out_of_range_are_told_with_the_file(saved):
    folder, _ = saved
    rewrite(folder, r=0, bias="some", task_type="SEQ_CLASS")
    with pytest.raises(ConfigError) as error:
        PeftModel.from_pretrained(llama(), folder)
    text = str(error.value)
    for part in ("r=0", "at least 1", "bias='some'", "task_type='SEQ_CLASS'", "'SEQ_CLS'"):
        assert part in text, part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LORA", "r": 3,}', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1, 2]", "expected a table"),
        ('"LORA"', "expected a table"),
        ('{"peft_type": "LORA", "target_modules": 5}', "target_modules=5"),
        ('{"peft_type": "LORA", "rank_pattern": [1]}', "rank_pattern"),
    ],
)
def test_t13_a_broken_configuration_file(text, message, saved):
    folder, _ = saved
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AfinaError, match=message):
        PeftModel.from_pretrained(llama(), folder)


def test_t13_bytes_that_are_no_text(saved):
    folder, _ = saved
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        PeftModel.from_pretrained(llama(), folder)


def test_t13_the_class_of_another_method(saved):
    folder, _ = saved
    assert isinstance(LoraConfig.from_pretrained(folder), LoraConfig)
    assert isinstance(PeftConfig.from_pretrained(folder), LoraConfig)
    assert isinstance(IA3Config.from_pretrained(folder), LoraConfig)  # as PEFT: the file says what it is
