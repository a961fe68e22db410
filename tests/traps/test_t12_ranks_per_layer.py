"""T12: a merged or combined adapter with per-layer ranks cannot be loaded again."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from trap_models import llama, logits, stir

from afina import LoraConfig, PeftModel, get_peft_model


def combined(combination_type="linear", **options):
    model = get_peft_model(
        llama(num_hidden_layers=12),
        LoraConfig(r=3, target_modules=["q_proj", "down_proj"], rank_pattern={r"layers\.1\.mlp\.down_proj": 5}),
        adapter_name="a",
    )
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 11]))
    stir(stir(model, "a", scale=0.1), "b", seed=5, scale=0.1)
    model.add_weighted_adapter(["a", "b"], [0.6, 0.8], "default", combination_type=combination_type, **options)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize(
    "options", [{}, {"combination_type": "ties", "density": 0.6}, {"combination_type": "svd", "svd_rank": 2}], ids=str
)
def test_t12_a_combination_is_loaded_again(options, tmp_path):
    model = combined(**options)
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(llama(num_hidden_layers=12), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(llama(num_hidden_layers=12), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)


def test_t12_ranks_really_differ(tmp_path):
    combined().save_pretrained(tmp_path, selected_adapters=["default"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    shapes = {t.shape[0] for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in k}
    assert len(shapes) > 2
    assert config["rank_pattern"]
    # block 1 and block 11 have ranks of their own: the pattern for one must not mean the other
    assert combined().peft_config["default"].for_module("model.layers.11.mlp.down_proj").r == 3
    assert combined().peft_config["default"].for_module("model.layers.1.mlp.down_proj").r == 5


def test_t12_a_combination_can_be_combined_and_merged_again(tmp_path):
    model = combined()
    model.add_weighted_adapter(["default", "b"], [1.0, -0.8], "again")
    model.set_adapter("again")
    got = logits(model)
    model.set_adapter("a")
    only = get_peft_model(llama(num_hidden_layers=12), model.peft_config["a"])
    only.load_state_dict(
        {k.replace(".a.", ".default."): v for k, v in model.state_dict().items() if ".adapters.a." in k}, strict=False
    )
    for adapter in only.adapters.adapters("default"):
        adapter.scaling *= 0.6
    torch.testing.assert_close(got, logits(only), rtol=1e-4, atol=1e-4)
    model.set_adapter("again")
    torch.testing.assert_close(logits(model.merge_and_unload()), got, rtol=1e-4, atol=1e-4)
