"""Switching and swapping adapters of a compiled model compiles nothing again, and answers are those of the adapter alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import afina
from afina import hotswap_adapter, prepare_model_for_compiled_hotswap
from afina.errors import AdapterNameError, CheckpointError, ConfigError, MergeError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(13, 7), nn.Linear(7, 11), nn.Linear(11, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(self.table(ids)).tanh())  # type: ignore[no-any-return]


torch.manual_seed(0)
BASE = Net()
IDS = torch.tensor([[1, 2, 12], [5, 0, 3]])
IA3 = afina.IA3Config(target_modules=["one"], feedforward_modules=[])


def lora(r: int = 3, **options: Any) -> afina.LoraConfig:
    return afina.LoraConfig(r=r, **{"target_modules": ["table", "one", "two"], **options})


def adapted(config: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return perturbed(afina.get_peft_model(copy.deepcopy(BASE), config), "default").eval()


def perturbed(model: Any, name: str) -> Any:
    for adapter in model.adapters.adapters(name):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def saved(config: Any, folder: Path, seed: int = 2) -> tuple[Path, torch.Tensor]:
    """A folder, and what its adapter answers."""
    model = adapted(config, seed)
    model.save_pretrained(folder)
    return folder, model(IDS).detach()


@pytest.fixture
def once() -> Iterator[None]:
    """Any compilation after the first is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("training", [False, True])
def test_switching_and_loading_compile_nothing_again(training: bool, tmp_path: Path) -> None:
    model = adapted(lora())
    for i in range(11):  # more than the compiler would compile a function for
        model.add_adapter(f"a{i}", lora())
        perturbed(model, f"a{i}")
    model.train(training)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IDS)
    seen = []
    for name in (f"a{i}" for i in (*range(11), 3)):
        model.set_adapter(name)
        seen.append(compiled(IDS))
        torch.testing.assert_close(seen[-1], model(IDS))
        if training:
            seen[-1].sum().backward()
            assert all(p.grad is not None for adapter in model.adapters.adapters(name) for p in adapter.parameters())
    assert not torch.equal(seen[0], seen[1])
    folder, expected = saved(lora(), tmp_path / "new")
    model.load_adapter(folder, "new", is_trainable=training)
    model.set_adapter("new")
    torch.testing.assert_close(compiled(IDS), expected)
    model.delete_adapter("new")
    torch.testing.assert_close(compiled(IDS), model(IDS))


def test_other_states_are_heeded_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = adapted(lora(target_modules=["one", "two"]))
    model.add_adapter("b", lora(target_modules=["one"]))
    perturbed(model, "b")
    compiled = torch.compile(model, backend="eager")
    for names in ("default", "b", ["default", "b"], ["b", "default"], "default"):
        model.set_adapter(names)
        torch.testing.assert_close(compiled(IDS), model(IDS))
        with model.disable_adapter():
            torch.testing.assert_close(compiled(IDS), BASE(IDS))
        state = model.adapters.runtime.state
        with model.adapters.runtime.using(type(state)(("b",))):
            torch.testing.assert_close(compiled(IDS), model(IDS))
    model.merge_adapter()
    torch.testing.assert_close(compiled(IDS), model(IDS))
    model.unmerge_adapter()
    torch.testing.assert_close(compiled(IDS), model(IDS))
    torch._dynamo.reset()


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize(
    "config",
    [lora(), lora(2), lora(1, lora_alpha=5, use_rslora=True), lora(2, rank_pattern={"one": 3}, alpha_pattern={"two": 32}),
     lora(target_modules=["one"])],
    ids=["alike", "smaller", "other scale", "patterns", "fewer layers"],
)  # fmt: skip
def test_a_swapped_adapter_answers_as_if_it_were_loaded(config: Any, tmp_path: Path) -> None:
    folder, expected = saved(config, tmp_path / "b")
    model = adapted(lora())
    before = {name: id(p) for name, p in model.named_parameters()}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert not torch.allclose(compiled(IDS), expected)
        hotswap_adapter(compiled, folder, adapter_name="default")
        torch.testing.assert_close(compiled(IDS), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [*model.peft_config] == ["default"]
    model.save_pretrained(tmp_path / "again")
    again = afina.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "again")
    torch.testing.assert_close(again(IDS), expected)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
def test_a_prepared_model_takes_larger_ranks(options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "target_modules": ["one", "two"]}
    patterns: dict[str, Any] = {"rank_pattern": {"one": 1}, "alpha_pattern": {"two": 7}, "use_rslora": True}
    model = adapted(lora(2, **patterns, **options))
    plain = model(IDS)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    torch.testing.assert_close(model(IDS), plain)
    model.save_pretrained(tmp_path / "prepared")
    again = afina.PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "prepared")
    torch.testing.assert_close(again(IDS), plain)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for r in (5, 2):
        folder, expected = saved(lora(r, lora_alpha=3, **options), tmp_path / f"r{r}", seed=r)
        hotswap_adapter(compiled, folder, "default")
        with torch.no_grad():
            torch.testing.assert_close(compiled(IDS), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(7), r"lora_A has the shape \[7, 7\], and expected is \[3, 7\]; prepare_model_for_compiled_hotswap\(.*=7\)"),
        (lora(use_dora=True, target_modules=["one", "two"]), "a DoRA, and expected is a LoRA"),
        (lora(modules_to_save=["two"], target_modules=["one"]), "two: a SavedModule, and expected is a LoRA"),
        (IA3, "it is of IA3Config, and expected is one of LoraConfig"),
    ],
    ids=["rank", "dora", "whole module", "method"],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(config: Any, message: str, tmp_path: Path) -> None:
    folder, _ = saved(config, tmp_path / "b")
    model = adapted(lora())
    before = model(IDS)
    with pytest.raises(CheckpointError, match=message):
        hotswap_adapter(model, folder, "default")
    assert torch.equal(model(IDS), before)
    assert [*model.peft_config] == ["default"]


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder, _ = saved(lora(), tmp_path / "b")
    with pytest.raises(CheckpointError, match="it adapts table, which the adapter that is there does not"):
        hotswap_adapter(adapted(lora(target_modules=["one", "two"])), folder, "default")


def test_names_and_merged_adapters(tmp_path: Path) -> None:
    folder, _ = saved(lora(), tmp_path / "b")
    model = adapted(lora())
    with pytest.raises(AdapterNameError, match=r"'defautl'.*default"):
        hotswap_adapter(model, folder, "defautl")
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        hotswap_adapter(model, folder, "default")
    with pytest.raises(ConfigError, match="a Net has no adapters"):
        hotswap_adapter(BASE, folder, "default")


def test_other_methods_are_swapped_where_they_are_alike(tmp_path: Path) -> None:
    folder, expected = saved(IA3, tmp_path / "b")
    model = adapted(IA3)
    hotswap_adapter(model, folder, "default")
    torch.testing.assert_close(model(IDS), expected)


def test_what_cannot_be_prepared_is_told() -> None:
    model = adapted(lora(3, rank_pattern={"two": 5}))
    with pytest.raises(ConfigError, match="two: the rank of 'default' is 5, more than target_rank=4"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    assert model.peft_config["default"].r == 8
    with pytest.raises(AdapterNameError, match="no LoRA"):
        prepare_model_for_compiled_hotswap(adapted(IA3))
