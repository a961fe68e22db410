"""T1: adapter keys that do not match the model load "fine" elsewhere, and the outputs are the base's."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from trap_models import bert, llama, logits, stir, trainable

from afina import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from afina.errors import CheckpointError

FILE = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    model = stir(get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"])))
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model)


def rewrite(folder, change):
    state = change(load_file(folder / FILE))
    save_file(state, folder / FILE, metadata={"format": "pt"})


def test_t01_matching_keys_load(saved):
    folder, expected = saved
    loaded = PeftModel.from_pretrained(llama(), folder)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    assert not torch.allclose(logits(loaded), logits(llama()))


def test_t01_every_wrong_key_is_listed(saved):
    folder, _ = saved

    def spoil(state):
        keys = sorted(state)
        state["base_model.model.nowhere.lora_A.weight"] = state.pop(keys[0])  # one missing, one unused
        state[keys[1]] = torch.zeros(5, 7)
        return state

    keys = sorted(load_file(folder / FILE))
    rewrite(folder, spoil)
    base = llama()
    before = logits(base)
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(base, folder)
    text = str(error.value)
    assert keys[0] in text
    assert "missing" in text
    assert "base_model.model.nowhere.lora_A.weight" in text
    assert f"{keys[1]} is [5, 7], expected" in text
    assert "strict=False" in text
    assert str(folder) in text
    # nothing has happened to the base
    torch.testing.assert_close(logits(base), before, rtol=0, atol=0)
    assert PeftModel.from_pretrained(base, folder, strict=False) is not None


def test_t01_an_adapter_of_other_names_does_not_load_as_nothing(saved):
    """The report of users: all keys are unused, and the model answers like its base. PEFT only warns."""
    import warnings

    import peft

    folder, _expected = saved
    rewrite(folder, lambda state: {k.replace("lora_A", "lora_a").replace("lora_B", "lora_b"): t for k, t in state.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        naive = peft.PeftModel.from_pretrained(llama(), folder)
    torch.testing.assert_close(logits(naive), logits(llama()))  # silently the base
    with pytest.raises(CheckpointError, match="8 keys are missing"):
        PeftModel.from_pretrained(llama(), folder)


def test_t01_not_strict_reports_counts_and_leaves_no_garbage(saved, caplog):
    folder, _ = saved

    def spoil(state):
        del state[sorted(state)[0]]
        return {**state, "base_model.model.extra": torch.ones(2)}

    rewrite(folder, spoil)
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    with caplog.at_level(logging.WARNING, logger="afina"):
        report = model.load_adapter(folder, "other", strict=False)
    assert (report.loaded, len(report.missing_keys), len(report.unexpected_keys), report.mismatched_keys) == (7, 1, 1, [])
    assert "1 keys are missing" in caplog.text
    # what the file lacks holds initial values, not whatever the memory held
    for adapter in model.adapters.adapters("other"):
        for parameter in adapter.parameters():
            assert torch.isfinite(parameter).all()
            assert parameter.abs().max() < 10
    missing = report.missing_keys[0]
    assert missing.endswith("lora_A.weight")
    path = missing.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    assert model.adapters.layers[path].adapters["other"].lora_A.std() > 0.01


def test_t01_loading_into_nothing_is_counted(saved):
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    report = set_peft_model_state_dict(model, {"base_model.model.x.lora_A.weight": torch.ones(3, 20)})
    assert (report.loaded, len(report.missing_keys), len(report.unexpected_keys)) == (0, 8, 1)


def test_t01_an_error_leaves_other_adapters_as_they_were(saved):
    folder, _expected = saved
    rewrite(folder, lambda state: {k + "x": t for k, t in state.items()})
    model = stir(get_peft_model(bert(), LoraConfig(r=2, task_type="SEQ_CLS")))
    before = logits(model)
    model.merge_adapter()
    merged, names = logits(model), trainable(model)
    with pytest.raises(CheckpointError):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    assert model.adapters.merged == ("default",)
    assert trainable(model) == names
    assert names
    torch.testing.assert_close(logits(model), merged, rtol=0, atol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
