"""T17: merging into 8- or 4-bit weights rounds the adapter away: measured, shown, refused above a threshold."""

import logging

import pytest
import torch
from trap_models import ids, llama

from afina import LoraConfig, get_peft_model
from afina.core.merge_error import merge_error, rounding
from afina.errors import MergeError
from afina.memory.storage import Storage

STORAGES = ["int8", "nf4", "fp4", "int8_weight_only"]
LIBRARY = {"int8_weight_only": "torchao"}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 97}


def adapted(folder, storage, strength=0.002):
    """A tiny model in a storage, with a LoRA that changes every weight by about a per cent."""
    import transformers as tf

    if storage not in ("fp32", "bf16"):
        pytest.importorskip(LIBRARY.get(storage, "bitsandbytes"))
    llama(**WIDE).save_pretrained(folder)
    model, _ = Storage(storage).load(tf.AutoModelForCausalLM, str(folder))
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=3, target_modules="all-linear")).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for adapter in model.adapters.adapters("default"):
            adapter.lora_B.normal_(std=strength)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


def batches():
    return [{"input_ids": ids(3, 11), "attention_mask": torch.ones(3, 11, dtype=torch.long)} for _ in range(2)]


@pytest.mark.parametrize("storage", STORAGES)
def test_t17_the_figures_are_what_merging_does(storage, folder):
    model, inputs = adapted(folder, storage), batches()[0]
    with torch.no_grad():
        want = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
        report = merge_error(model, [inputs])
        assert torch.equal(model(**inputs).logits, want)  # the model is as it was
        model.merge_adapter(max_error=float("inf"))
        merged = model(**inputs).logits
        weights = {k: layer.view.weight().float().clone() for k, layer in model.adapters.layers.items()}
        model.unmerge_adapter()
    assert report.outputs.error == pytest.approx(float((merged - want).norm() / want.norm()), rel=1e-3)
    assert report.outputs.lost == pytest.approx(float((merged - want).norm() / (want - base).norm()), rel=1e-3)
    assert report.lost == report.outputs.lost
    assert len(report.layers) == 14
    for layer in report.layers:
        view, adapter = model.adapters.layers[layer.path].view, model.adapters.layers[layer.path].adapters["default"]
        before, delta = view.weight().float(), adapter.delta_weight().detach()
        gone = weights[layer.path] - before - delta
        assert layer.error == pytest.approx(float(gone.norm() / (before + delta).norm()), rel=1e-3)
        assert layer.lost == pytest.approx(abs(float((gone * delta).sum() / delta.square().sum())), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_t17_four_bits_round_a_small_change_away_and_are_refused(storage, folder):
    model = adapted(folder, storage)
    stored = {n: p.data.clone() for n, p in model.named_parameters()}
    report = rounding(model.adapters)
    assert report.error < 0.05  # which alone looks harmless
    assert report.lost > 0.5
    for given in ({}, {"batches": batches()}):
        with pytest.raises(MergeError, match=r"max_error allows 10%.*T17(.|\n)*base=\"dequantised\""):
            model.merge_adapter(**given)
        with pytest.raises(MergeError, match="T17"):
            model.merge_and_unload(**given)
    assert all(torch.equal(p.data, stored[n]) for n, p in model.named_parameters())
    assert model.adapters.merged == ()


def test_t17_a_stronger_adapter_survives_eight_bits_and_the_loss_is_shown(folder, caplog):
    model = adapted(folder, "int8", strength=0.05)
    with caplog.at_level(logging.WARNING, logger="afina"):
        model.merge_adapter(batches=batches())
    assert "14 layers in bitsandbytes int8" in caplog.text
    assert "of what the adapter does; the same first choice at" in caplog.text
    assert model.adapters.merged == ("default",)


def test_t17_what_was_refused_is_done_when_asked(folder):
    model = adapted(folder, "nf4")
    with pytest.raises(MergeError) as refused:
        model.merge_adapter()
    asked = float(str(refused.value).rsplit("max_error=", 1)[1])
    model.merge_adapter(max_error=asked)
    assert model.adapters.merged == ("default",)


def test_t17_plain_weights_lose_nothing_and_nothing_is_said(folder, caplog):
    model = adapted(folder, "fp32")
    assert rounding(model.adapters).layers == []
    with caplog.at_level(logging.WARNING, logger="afina"):
        report = merge_error(model, batches())
        model.merge_adapter(max_error=0.0)
    assert report.outputs.lost < 1e-4
    assert caplog.text == ""


def test_t17_hidden_positions_do_not_count(folder):
    model = adapted(folder, "nf4")
    whole = ids(2, 11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[:, 7:] = 0
    other = whole.clone()
    other[:, 7:] = (other[:, 7:] + 13) % 97
    told = [merge_error(model, [{"input_ids": x, "attention_mask": mask}]).outputs for x in (whole, other)]
    assert told[0] == told[1]
    assert told[0].positions == 14
