"""Files that PEFT may have written long ago, or somebody else with intent."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import afina

from .cases import Case, assert_close, logits, ours, peft_warnings, save, theirs
from .models import build

CASE = Case("bert", options={"r": 3})


def test_a_bin_of_peft_is_read(tmp_path: Path) -> None:
    model = theirs(CASE)
    with peft_warnings():
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    own = afina.PeftModel.from_pretrained(build("bert"), tmp_path)
    assert_close(logits(own, "bert"), logits(model, "bert"), "output")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_bin_that_runs_code_is_refused(how: str, tmp_path: Path) -> None:
    folder, mark = save(ours(CASE), tmp_path / "adapter"), tmp_path / "ran"
    (folder / "adapter_model.safetensors").unlink()
    content = {**afina.get_peft_model_state_dict(ours(CASE)), "harm": Malicious(mark)}
    if how == "torch":
        torch.save(content, folder / "adapter_model.bin")
    else:
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="never runs the code in a file"):
        afina.PeftModel.from_pretrained(build("bert"), folder)
    assert not mark.exists()


def test_safetensors_go_before_a_bin_beside_them(tmp_path: Path) -> None:
    own = ours(CASE)
    folder = save(own, tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"\x80 not a pickle")
    assert_close(logits(afina.PeftModel.from_pretrained(build("bert"), folder), "bert"), logits(own, "bert"), "output")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v != "gone"}))


def test_configurations_of_other_versions_are_read(tmp_path: Path) -> None:
    """An older PEFT wrote fewer keys, a newer one writes keys that ask for nothing."""
    model = theirs(CASE)
    folder = save(model, tmp_path)
    gone = (
        "use_dora",
        "lora_bias",
        "target_parameters",
        "ensure_weight_tying",
        "exclude_modules",
        "peft_version",
        "arrow_config",
    )
    edit(folder, **dict.fromkeys(gone, "gone"), some_future_config=None, another_option=False)
    own = afina.PeftModel.from_pretrained(build("bert"), folder)
    assert_close(logits(own, "bert"), logits(model, "bert"), "output")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
        ({"some_future_switch": True}, "some_future_switch"),
    ],
    ids=str,
)
def test_what_afina_does_not_do_is_refused_by_name(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = save(theirs(CASE), tmp_path)
    edit(folder, **change)
    with pytest.raises(ValueError, match=f"{named}.*PEFT 0\\."):
        afina.PeftModel.from_pretrained(build("bert"), folder)


def test_per_expert_adapters_of_older_transformers_are_explained(tmp_path: Path) -> None:
    """PEFT turns such a file into one for fused experts; afina says what it found instead of loading a part of it."""
    folder = save(theirs(Case("mixtral", options={"target_modules": ["q_proj"]})), tmp_path)
    edit(folder, target_modules=["q_proj", "w1", "w3"])
    own = afina.PeftModel.from_pretrained(build("mixtral"), folder)  # nothing of w1 and w3 in the file: nothing is lost
    assert sorted(own.adapters.injected["default"].adapted)[0].endswith("q_proj")
    state = afina.get_peft_model_state_dict(own)
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_{}.weight"
    for side, shape in (("A", (8, 24)), ("B", (28, 8))):
        state[name.format(side)] = torch.ones(shape)
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"experts\.0\.w1"):
        afina.PeftModel.from_pretrained(build("mixtral"), folder)


def test_several_adapters_lie_in_folders_of_their_names(tmp_path: Path) -> None:
    """The layout of PEFT: "default" at the root, the others below it; both read both."""
    own = ours(CASE)
    own.add_adapter("second", afina.LoraConfig(task_type="SEQ_CLS", r=5, target_modules=["key"], init_lora_weights=False))
    own.save_pretrained(tmp_path)
    with peft_warnings():
        read = peft.PeftModel.from_pretrained(build("bert"), tmp_path)
        read.load_adapter(tmp_path / "second", "second")
        read.set_adapter("second")
    own.set_adapter("second")
    assert_close(logits(read, "bert"), logits(own, "bert"), "output")
    with peft_warnings():
        read.save_pretrained(tmp_path / "theirs")
    again = afina.PeftModel.from_pretrained(build("bert"), tmp_path / "theirs")
    again.load_adapter(tmp_path / "theirs" / "second", "second")
    again.set_adapter("second")
    assert_close(logits(again, "bert"), logits(own, "bert"), "output")
