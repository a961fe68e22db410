"""Equal to PEFT: what one package writes, the other reads, with the same outputs, gradients and training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import afina

from .cases import (
    CASES,
    PROMPTS,
    Case,
    assert_close,
    gradients,
    logits,
    loss_of,
    ours,
    peft_warnings,
    plain,
    save,
    theirs,
)
from .models import batch, build

ENCODED = ("prefix_projection", "encoder_hidden_size")  # the output of a network is stored, and PEFT trains the network


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_folder_of_peft_gives_the_same_output_and_gradients(case: Case, tmp_path: Path) -> None:
    model = theirs(case)
    folder = save(model, tmp_path)
    read = afina.PeftModel.from_pretrained(build(case.model), folder, is_trainable=True)
    assert_close(logits(read, case.model), logits(model, case.model), "output")

    model.train(), read.train()
    loss_of(model, case.model).backward()
    loss_of(read, case.model).backward()
    if case in PROMPTS:
        compare_prompt_gradients(case, model, read)
        return
    expected, found = gradients(peft, model), gradients(afina, read)
    assert found.keys() == expected.keys()
    assert found
    for key, gradient in expected.items():
        assert_close(found[key], gradient, f"gradient of {key}", 2e-5)


def compare_prompt_gradients(case: Case, model: Any, read: Any) -> None:
    """The gradient of the virtual tokens themselves, through the network that makes them where PEFT has one."""
    found = read.prompt_encoder["default"].output()
    assert found.requires_grad
    if not any(option in case.options for option in ENCODED):
        [expected] = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("prompt_encoder")]
        assert_close(found.grad, expected.grad, "gradient of the prompt")
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and parameter.requires_grad:
            [own] = [p for n, p in read.named_parameters() if p.requires_grad and n.endswith(name.rsplit(".", 1)[1])]
            assert_close(own.grad, parameter.grad, f"gradient of {name}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_folder_of_afina_gives_the_same_output_in_peft(case: Case, tmp_path: Path) -> None:
    model = ours(case)
    folder = save(model, tmp_path)
    with peft_warnings() as messages:
        read = peft.PeftModel.from_pretrained(build(case.model), folder)
    told = [m for m in messages if "nexpected" in m or "issing" in m or "ignored" in m]
    assert all(case.told and case.told in m for m in told), told
    with peft_warnings():
        found = plain(peft.get_peft_model_state_dict(read)) if case not in PROMPTS else {}
    expected = load_file(folder / "adapter_model.safetensors")
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key
    assert case in PROMPTS or case.told or not expected.keys() - found.keys(), "PEFT is silent about keys it does not take"
    assert_close(logits(read, case.model), logits(model, case.model), "output")


# where afina names what PEFT leaves open, and the reverse
FREE = {"target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "fan_in_fan_out", "peft_version",
        "encoder_hidden_size"}  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.same_files], ids=str)
def test_the_same_options_give_the_same_files(case: Case, tmp_path: Path) -> None:
    one, other = save(theirs(case), tmp_path / "peft"), save(ours(case), tmp_path / "afina")
    expected, found = (plain(load_file(folder / "adapter_model.safetensors")) for folder in (one, other))
    assert {k: list(t.shape) for k, t in found.items()} == {k: list(t.shape) for k, t in expected.items()}
    expected, found = (json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other))
    assert not found.keys() - expected.keys(), "keys that PEFT does not know"
    differing = {k: (v, expected[k]) for k, v in found.items() if k not in FREE and plainly(v) != plainly(expected[k])}
    assert not differing


def plainly(value: Any) -> Any:
    """A list in any order, and one thing alone as a list of it."""
    return sorted(value) if isinstance(value, list) else [value]


SHARED = [
    Case("bert", options={"r": 5}),
    Case("gpt2", options={"r": 5}),
    Case("llama", options={"use_rslora": True, "target_modules": "all-linear"}),
    Case("t5", options={"r": 3}),
    Case("opt", options={"bias": "all"}),
    Case("bart", options={"bias": "lora_only", "lora_alpha": 29}),
    Case("bert", options={"lora_bias": True}),
    Case("gpt2", options={"lora_bias": True}),
    Case("vit", options={"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    Case("whisper", options={"target_modules": ["q_proj", "v_proj"]}),
    Case("conv", options={"target_modules": ["conv1", "conv2", "seq"], "r": 3}),
    Case("vit", options={"target_modules": ["projection"]}),
    Case("gpt2", options={"target_modules": ["wte", "wpe"]}),
    Case("bert", options={"target_modules": ["word_embeddings"]}),
    Case("mixtral", options={"target_parameters": ["gate_up_proj", "down_proj"]}),
    Case("qwen3moe", options={"target_parameters": ["gate_up_proj", "down_proj"]}),
    Case("llama-tied", options={"trainable_token_indices": [3, 17, 5, 20]}),
    Case("bert", options={"trainable_token_indices": [3, 17, 5, 20]}),
    Case("llama-tied", options={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    Case("gpt2", options={"modules_to_save": ["ln_f"]}),
    *[Case(m, options={"use_dora": True}) for m in ("bert", "gpt2", "llama", "t5")],
    Case("conv", options={"use_dora": True, "target_modules": ["conv1", "conv2"]}),
    *[Case(m, "IA3Config") for m in ("gpt2", "llama", "t5")],
    *[Case(m, "LNTuningConfig") for m in ("gpt2", "llama", "t5")],
    *[Case(m, "TrainableTokensConfig", {"token_indices": list(range(3, 40))}) for m in ("gpt2", "t5", "opt")],
    *[Case(m, "HRAConfig", {"target_modules": t, "r": 4}) for m, t in (("bert", ["query"]), ("t5", ["q", "v"]))],
    *[Case(m, "PromptTuningConfig", {"num_virtual_tokens": 5}) for m in ("bert", "gpt2", "llama", "t5")],
    *[Case(m, "PrefixTuningConfig", {"num_virtual_tokens": 5}) for m in ("bert", "gpt2", "llama", "t5")],
]


def losses(model: Any, name: str, steps: int = 20) -> list[float]:
    model.train()
    # eps stands above the rounding of gradients that are zero, by which both would wander off in steps of the full size
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-6)
    found = []
    for step in range(steps):
        data = {k: v.roll(step, 0)[:2] for k, v in batch(name).items()}
        with peft_warnings():
            loss = model(**data)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_twenty_steps_of_training_give_the_same_losses(case: Case, tmp_path: Path) -> None:
    model = theirs(case)
    read = afina.PeftModel.from_pretrained(build(case.model), save(model, tmp_path), is_trainable=True)
    expected, found = losses(model, case.model), losses(read, case.model)
    assert min(expected[10:]) < expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


NETWORKS = [
    Case("gpt2", "PrefixTuningConfig", {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 13}),
    Case("llama", "PrefixTuningConfig", {"num_virtual_tokens": 5, "prefix_projection": True}),
    Case("t5", "PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 13}),
    Case("bert", "PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 11}),
    Case("gpt2", "PromptEncoderConfig", {"num_virtual_tokens": 5}),
    *[
        Case(m, "PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM"})
        for m in ("llama", "t5")
    ],
]


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_the_networks_behind_prompts_train_alike(case: Case) -> None:
    """PEFT does not store them, so their weights are handed over one by one; the order of the layers is the same."""
    model, own = theirs(case), ours(case)
    given = [p for n, p in model.named_parameters() if n.startswith("prompt_encoder")]
    taken = list(own.prompt_encoder["default"].parameters())
    heads = [[p for n, p in m.named_parameters() if p.requires_grad and "classifier" in n] for m in (model, own)]
    assert [p.shape for p in taken] == [p.shape for p in given]
    with torch.no_grad():
        for target, source in zip(taken + heads[1], given + heads[0], strict=True):
            target.copy_(source)
    assert_close(logits(own, case.model), logits(model, case.model), "output")
    model.train(), own.train()
    loss_of(model, case.model).backward()
    loss_of(own, case.model).backward()
    for target, source in zip(taken, given, strict=True):
        assert_close(target.grad, source.grad, "gradient")
    model.zero_grad(), own.zero_grad()
    expected, found = losses(model, case.model), losses(own, case.model)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case", [Case("bert", options={"r": 5}), Case("t5", "IA3Config"), Case("gpt2", "LNTuningConfig")], ids=str
)
def test_state_dicts_move_between_the_two(case: Case) -> None:
    model, own = theirs(case), ours(case)
    afina.set_peft_model_state_dict(own, peft.get_peft_model_state_dict(model))
    assert_close(logits(own, case.model), logits(model, case.model), "output")
    other = ours(case)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    result = peft.set_peft_model_state_dict(model, afina.get_peft_model_state_dict(other))
    assert not result.unexpected_keys
    assert_close(logits(other, case.model), logits(model, case.model), "output")
