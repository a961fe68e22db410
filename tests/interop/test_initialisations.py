"""Adapters of PEFT that began in a way afina does not: read where the file says it all, refused where it does not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import afina
from afina.errors import ConfigError

peft = pytest.importorskip("peft", reason="peft is not installed")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(17, 13)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def written(init: str, base: nn.Module, folder: Path) -> torch.Tensor:
    """PEFT writes a trained adapter; its output on the input of `given`."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=init))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model(given()).detach()


def given() -> torch.Tensor:
    return torch.randn(5, 17, generator=torch.Generator().manual_seed(1))


def test_what_leaves_the_base_alone_is_read(tmp_path: Path) -> None:
    base = Model()
    expected = written("orthogonal", base, tmp_path)
    loaded = afina.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(loaded(given()), expected, atol=1e-6)
    with pytest.raises(ConfigError, match="'orthogonal': afina reads adapters that began so"):
        afina.get_peft_model(base, afina.LoraConfig(target_modules=["layer"], init_lora_weights="orthogonal"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_changed_the_base_is_refused(init: str, tmp_path: Path) -> None:
    base = Model()
    written(init, base, tmp_path)
    with pytest.raises(ConfigError, match=f"'{init}' changed the base.*path_initial_model_for_weight_conversion"):
        afina.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
