"""Adapter folders that are broken in one way or another: an error that says how, and never half an adapter."""

import json
import os
import pickle
import struct

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from trap_models import bert, gpt2, llama, logits, stir

from afina import AutoPeftModel, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from afina.core import files
from afina.errors import AfinaError, CheckpointError, ConfigError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make(seed=2):
    return stir(get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"])), seed=seed)


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def truncated(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 40])


def header_cut(path):
    path.write_bytes(path.read_bytes()[:30])


def header_too_long(path):
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")


def header_no_json(path):
    path.write_bytes(struct.pack("<Q", 8) + b"{broken}")


def a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "truncated": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "header cut": header_cut,
    "header too long": header_too_long,
    "header no json": header_no_json,
    "a text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
    "a pickle": lambda path: torch.save({"a": torch.ones(2)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_weights_are_said_to_be_broken(damage, folder):
    DAMAGE[damage](folder / WEIGHTS)
    base = llama()
    before = logits(base)
    with pytest.raises(CheckpointError, match="broken or not a safetensors file") as error:
        PeftModel.from_pretrained(base, folder)
    assert str(folder / WEIGHTS) in str(error.value)
    torch.testing.assert_close(logits(base), before, rtol=0, atol=0)
    get_peft_model(base, LoraConfig(r=2))  # the base is whole and can be adapted


def test_no_tensors_at_all(folder):
    save_file({}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="4 keys are missing"):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file(name, folder):
    (folder / name).unlink()
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(llama(), folder)
    assert name in str(error.value)
    assert str(folder) in str(error.value)
    if name == CONFIG:
        assert WEIGHTS in str(error.value)  # what it holds


def test_a_folder_in_the_place_of_the_weights(folder):
    a_folder(folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("where", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_no_folder(where):
    for load in (lambda: PeftModel.from_pretrained(llama(), where), lambda: AutoPeftModel.from_pretrained(where)):
        with pytest.raises(CheckpointError, match="there is no folder") as error:
            load()
        assert where in str(error.value)


@pytest.mark.parametrize("text", ['{"peft_type": "LORA", "r": 3,}', "{", "", "\x00"])
def test_a_configuration_that_is_no_json(text, folder):
    (folder / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match="not valid JSON") as error:
        PeftModel.from_pretrained(llama(), folder)
    assert str(folder / CONFIG) in str(error.value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("should-not-be-here",)


def test_a_bin_file_runs_no_code(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "adapter_model.bin")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), folder)), logits(make()), rtol=0, atol=0)
    for write in (lambda f: torch.save({**state, "x": Evil()}, f), lambda f: pickle.dump(Evil(), f)):
        with open(folder / "adapter_model.bin", "wb") as file:
            write(file)
        with pytest.raises(CheckpointError, match="never runs the code"):
            PeftModel.from_pretrained(llama(), folder)
    assert not (tmp_path / "should-not-be-here").exists()
    torch.save([torch.ones(2)], folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="table of tensors"):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_not_saved(value, folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = make(seed=9)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = value
    with pytest.raises(CheckpointError, match="not finite") as error:
        model.save_pretrained(folder)
    assert "q_proj.lora_A.weight" in str(error.value)
    assert "nothing was written" in str(error.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_large_values_are_saved(tmp_path):
    """Whose sum is more than a number can be."""
    large = {"weight": torch.full((3, 5), 3e38), "half": torch.full((7,), 6e4, dtype=torch.float16)}
    files.write_weights(tmp_path / WEIGHTS, large, {})
    found = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in large.items())


def test_values_that_are_not_finite_are_not_loaded(folder):
    state = load_file(folder / WEIGHTS)
    key = sorted(state)[0]
    state[key][0, 0] = float("nan")
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite") as error:
        PeftModel.from_pretrained(llama(), folder)
    assert key in str(error.value)


@pytest.mark.parametrize("step", ["save_file", "fsync", "read back", "config"])
def test_a_save_that_fails_leaves_the_old_file(step, folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = make(seed=9)
    if step == "save_file":
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
    elif step == "fsync":
        monkeypatch.setattr(files.os, "fsync", fail)
    elif step == "read back":
        monkeypatch.setattr(files, "read_weights", lambda path: {})
    else:
        monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises((OSError, CheckpointError)):
        model.save_pretrained(folder)
    monkeypatch.undo()
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert after.keys() == before.keys()  # no temporary file is left
    assert after[CONFIG] == before[CONFIG]
    if step != "config":
        assert after == before
        torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), folder)), logits(make()), rtol=0, atol=0)
    model.save_pretrained(folder)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), folder)), logits(model), rtol=0, atol=0)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        make().save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_save_over_another_adapter_leaves_nothing_of_it(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "adapter_model.bin")
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "afina.json", "README.md"}
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(make()), rtol=0, atol=0)
    assert "q_proj" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    make().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_adapter_on_the_meta_device_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = get_peft_model(llama(), LoraConfig(r=3))
    with pytest.raises(CheckpointError, match="meta device"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


def test_pickles_are_not_written(tmp_path):
    with pytest.raises(ConfigError, match="safe_serialization=False"):
        make().save_pretrained(tmp_path, safe_serialization=False)


def test_the_adapter_of_another_model_is_an_afina_error(folder):
    for other in (bert, gpt2):
        with pytest.raises(AfinaError):
            PeftModel.from_pretrained(other(), folder)
