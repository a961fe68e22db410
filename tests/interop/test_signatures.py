"""The keyword arguments that PEFT documents: afina takes them by the same names, or says clearly what it does not do."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import afina
from afina.errors import AfinaError, ConfigError

from .cases import Case, assert_close, logits, ours, peft_warnings, save, theirs
from .models import build

FUNCTIONS = (
    "get_peft_config", "get_peft_model", "get_peft_model_state_dict", "inject_adapter_in_model",
    "prepare_model_for_kbit_training", "set_peft_model_state_dict",
)  # fmt: skip
METHODS = (
    "__init__", "add_adapter", "delete_adapter", "disable_adapter", "from_pretrained", "get_base_model",
    "get_nb_trainable_parameters", "load_adapter", "print_trainable_parameters", "push_to_hub", "save_pretrained",
    "set_adapter",
)  # fmt: skip
OF_TUNERS = ("add_weighted_adapter", "merge_adapter", "merge_and_unload", "unload", "unmerge_adapter")
CONFIGS = (
    "HRAConfig", "IA3Config", "LNTuningConfig", "LoraConfig", "PrefixTuningConfig", "PromptEncoderConfig",
    "PromptTuningConfig", "TrainableTokensConfig",
)  # fmt: skip
CLASSES = [n for n in peft.__dict__ if n.startswith(("AutoPeftModel", "PeftModelFor")) or n in ("PeftModel", "PeftConfig")]


def names(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


TABLE = [
    *[(f, getattr(peft, f), getattr(afina, f)) for f in FUNCTIONS],
    *[(f"PeftModel.{m}", getattr(peft.PeftModel, m), getattr(afina.PeftModel, m)) for m in METHODS],
    *[(f"LoraModel.{m}", getattr(peft.LoraModel, m), getattr(afina.PeftModel, m)) for m in OF_TUNERS],
    *[
        (f"{c}.{m}", getattr(getattr(peft, c), m), getattr(getattr(afina, c), m))
        for c in ("PeftConfig",)
        for m in ("from_pretrained", "save_pretrained", "to_dict")
    ],
    ("AutoPeftModel.from_pretrained", peft.AutoPeftModel.from_pretrained, afina.AutoPeftModel.from_pretrained),
]


@pytest.mark.parametrize(("name", "theirs", "ours"), TABLE, ids=[row[0] for row in TABLE])
def test_every_argument_of_peft_has_its_name_and_place(name: str, theirs: Any, ours: Any) -> None:
    wanted, found = names(theirs), names(ours)
    assert set(wanted) <= set(found)
    if name != "PeftModel.from_pretrained":
        assert found[: len(wanted)] == wanted, "the same order, for calls without names"


def test_every_name_of_the_face_is_exported() -> None:
    wanted = [*FUNCTIONS, *CONFIGS, *CLASSES, "TaskType", "PeftType", "PromptTuningInit"]
    assert not [n for n in wanted if not hasattr(afina, n)]
    assert [t.value for t in afina.TaskType] == [t.value for t in peft.TaskType]
    assert {t.value for t in afina.PeftType} & {t.value for t in peft.PeftType} >= {
        "LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "LN_TUNING", "TRAINABLE_TOKENS", "HRA",
    }  # fmt: skip
    for name in (n for n in CLASSES if n.startswith("PeftModelFor")):
        assert issubclass(getattr(afina, name), afina.PeftModel)


REQUIRED: dict[str, dict[str, Any]] = {
    "PrefixTuningConfig": {"num_virtual_tokens": 3}, "PromptEncoderConfig": {"num_virtual_tokens": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_take_all_of_peft_s_options_with_its_defaults(name: str) -> None:
    theirs, ours = getattr(peft, name), getattr(afina, name)
    with peft_warnings():
        default = theirs(**REQUIRED.get(name, {}))
    given = {f.name: getattr(default, f.name) for f in dataclasses.fields(theirs) if f.name != "peft_version"}
    made = ours(**{k: getattr(v, "value", v) for k, v in given.items() if k != "runtime_config"})
    for key in {f.name for f in dataclasses.fields(made)} & given.keys():
        assert getattr(made, key) == getattr(given[key], "value", given[key]), key
    plain = ours(**REQUIRED.get(name, {}))
    assert plain == made


SOMETHING: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2], "eva_config": {"rho": 2.0}, "layer_replication": [[0, 2]],
    "loftq_config": {"bits": 4},
    "megatron_config": {"x": 1}, "use_qalora": True, "arrow_config": {"top_k": 2}, "corda_config": {"x": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", SOMETHING)
def test_what_is_not_done_is_refused_when_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        afina.LoraConfig(**{name: SOMETHING[name]})


def test_misspelt_options_name_the_nearest_and_all_come_at_once() -> None:
    with pytest.raises(ConfigError, match=r"lora_alhpa.*lora_alpha") as raised:
        afina.LoraConfig(lora_alhpa=3, targt_modules=["q"])
    assert "target_modules" in str(raised.value)
    with pytest.raises(ConfigError, match="configures 'LORA'"):
        afina.LoraConfig(peft_type="IA3")
    with pytest.raises(TypeError, match="adaptr_name"):
        afina.get_peft_model(build("bert"), afina.LoraConfig(), adaptr_name="x")  # type: ignore[call-arg]


def test_misspelt_arguments_of_loading_and_saving_are_refused(tmp_path: Path) -> None:
    own = ours(Case("bert"))
    with pytest.raises(ConfigError, match="selected_adapter"):
        own.save_pretrained(tmp_path, selected_adapter=["default"])
    save(own, tmp_path)
    with pytest.raises(AfinaError, match=r"revison.*revision"):
        afina.PeftModel.from_pretrained(build("bert"), tmp_path, revison="main")
    with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion"):
        own.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload"):
        afina.PeftModel.from_pretrained(build("bert"), tmp_path, ephemeral_gpu_offload=True)


def test_arguments_that_change_nothing_may_be_given(tmp_path: Path) -> None:
    made = afina.get_peft_model(build("bert"), afina.LoraConfig(task_type="SEQ_CLS"), "default", True, True, "main", True)
    assert made.peft_config["default"].revision == "main"
    made.add_adapter("b", afina.LoraConfig(), low_cpu_mem_usage=True)
    save(made, tmp_path)
    read = afina.PeftModel.from_pretrained(build("bert"), tmp_path, low_cpu_mem_usage=True)
    read.load_adapter(tmp_path / "b", "b", torch_device="cpu", low_cpu_mem_usage=True)
    assert_close(logits(read, "bert"), logits(made, "bert"), "output")
    state = afina.get_peft_model_state_dict(made, unwrap_compiled=True)
    afina.set_peft_model_state_dict(read, state, low_cpu_mem_usage=True)
    afina.prepare_model_for_kbit_training(build("bert"), use_gradient_checkpointing=False, auto_clear_cache=True)


@pytest.mark.parametrize("package", [peft, afina], ids=lambda p: p.__name__)
def test_keys_can_be_mapped(package: Any, tmp_path: Path) -> None:
    case = Case("bert", options={"target_modules": ["query"], "init_lora_weights": False})
    folder = save(theirs(case), tmp_path)
    expected = logits(theirs(case), "bert")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {k.replace("bert.encoder", "trunk.blocks"): v for k, v in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with peft_warnings():
        read = package.PeftModel.from_pretrained(build("bert"), folder, key_mapping={r"^trunk\.blocks": "bert.encoder"})
    assert_close(logits(read, "bert"), expected, "output")


@pytest.mark.parametrize("package", [peft, afina], ids=lambda p: p.__name__)
def test_layers_to_inject_into_can_come_from_a_state_dict(package: Any) -> None:
    case = Case("llama", options={"target_modules": ["layers.1.self_attn.q_proj", "down_proj"], "r": 3}, task=False)
    state = {k.removeprefix("base_model.model."): v for k, v in afina.get_peft_model_state_dict(ours(case)).items()}
    model = build("llama")
    with peft_warnings():
        package.inject_adapter_in_model(package.LoraConfig(r=3), model, state_dict=state)
        package.set_peft_model_state_dict(model, {f"base_model.model.{k}": v for k, v in state.items()})
        assert len(package.get_peft_model_state_dict(model)) == len(state)
    if package is afina:
        assert_close(logits(model, "llama"), logits(ours(case), "llama"), "output")


def test_shapes_that_differ_are_refused_unless_they_may(tmp_path: Path) -> None:
    own = ours(Case("bert", options={"r": 3}))
    before = logits(own, "bert")
    state = afina.get_peft_model_state_dict(ours(Case("bert", options={"r": 5})))
    with pytest.raises(AfinaError, match="ignore_mismatched_sizes"):
        afina.set_peft_model_state_dict(own, state)
    assert torch.equal(logits(own, "bert"), before)
