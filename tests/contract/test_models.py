"""The contract on whole models, with what each method adapts by default."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build
from cases import perturb

import afina
from afina.core.registry import get_method, methods
from afina.core.runtime import BASE_ROW
from afina.errors import AfinaError, MergeError, TargetError, TrainingError

OPTIONS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True},
    "p_tuning": {"num_virtual_tokens": 3},
    "hra": {"r": 4},
    "trainable_tokens": {"token_indices": [40, 3, 17, 8, 29]},
}
NO_TOKENS = ("vit", "mobilenet", "whisper")
NOT_POSSIBLE = {
    **{("bitfit", a): "no biases" for a in ("llama", "mixtral", "t5")},
    **{("prompt_tuning", a): "token" for a in NO_TOKENS},
    **{("p_tuning", a): "token" for a in NO_TOKENS},
    ("prefix_tuning", "mobilenet"): "prefix tuning found|not found in the base model",
    ("trainable_tokens", "vit"): "TrainableTokens cannot adapt",
    ("trainable_tokens", "mobilenet"): "has no table of tokens",
    ("hra", "mobilenet"): "found no layer of MobileNetV2ForImageClassification",
    ("bottleneck", "mobilenet"): "found no layer of MobileNetV2ForImageClassification",
}
PAIRS = [(m, a) for m in methods() for a in ARCHITECTURES if (m, a) not in NOT_POSSIBLE]
every_pair = pytest.mark.parametrize(("method", "architecture"), PAIRS)


def adapt(method: str, architecture: str, **more: Any) -> tuple[Any, dict[str, Any], Any]:
    """An adapted model with a perturbed adapter, an input, and the bare model's twin."""
    base, inputs, task = build(architecture)
    twin = copy.deepcopy(base).requires_grad_(False)  # gradients make torch choose other kernels
    config = get_method(method).make_config(task_type=task, **{**OPTIONS.get(method, {}), **more})
    model = afina.get_peft_model(base, config).eval()
    perturb(model.adapters, "default", 0.1)
    return model, inputs, twin


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-4) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= limit * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize(("method", "architecture"), NOT_POSSIBLE)
def test_what_cannot_be_adapted_says_so(method: str, architecture: str) -> None:
    base, inputs, task = build(architecture)
    before = base(**inputs).logits
    with pytest.raises(AfinaError, match=NOT_POSSIBLE[method, architecture]):
        afina.get_peft_model(base, get_method(method).make_config(task_type=task, **OPTIONS.get(method, {})))
    assert torch.equal(base(**inputs).logits, before)


@every_pair
def test_changes_the_output_and_disabled_is_the_base(method: str, architecture: str) -> None:
    model, inputs, twin = adapt(method, architecture)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    out = model(**inputs).logits
    assert out.shape != twin(**inputs).logits.shape or not close(out, twin(**inputs).logits, 1e-6)


@every_pair
def test_merged_equals_unmerged(method: str, architecture: str) -> None:
    model, inputs, _ = adapt(method, architecture)
    expected = model(**inputs).logits
    if not get_method(method).adapter.mergeable:
        with pytest.raises(MergeError):
            model.merge_adapter()
        return
    model.merge_adapter()
    assert close(model(**inputs).logits, expected)
    model.unmerge_adapter()
    assert torch.equal(model(**inputs).logits, expected)
    bare = model.merge_and_unload()
    assert close(bare(**inputs).logits, expected)
    assert not any("adapters" in n for n, _ in bare.named_modules())


@every_pair
def test_save_load_and_train_on(method: str, architecture: str, tmp_path: Path) -> None:
    """What was trained is what comes back, also the encoders behind prompts when training goes on (T3)."""
    model, inputs, twin = adapt(method, architecture)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = afina.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path)
    assert close(loaded(**inputs).logits, expected, 1e-6)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded = afina.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True)
    for one in (model, loaded):
        torch.manual_seed(0)
        one.train()
        one(**inputs).loss.backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    have = {n: p.grad for n, p in loaded.named_parameters() if p.requires_grad}
    assert want.keys() == have.keys()
    assert all((g is None and have[n] is None) or close(have[n], g, 1e-5) for n, g in want.items())


@every_pair
def test_exactly_the_adapter_trains(method: str, architecture: str) -> None:
    model, inputs, _ = adapt(method, architecture)
    model.train()
    model(**inputs).loss.backward()
    own = {id(p) for a in model.adapters.adapters("default") for p in a.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        assert (parameter.grad is None) or parameter.requires_grad, name
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@every_pair
def test_gradient_checkpointing_gives_the_same_gradients(method: str, architecture: str) -> None:
    if architecture == "mobilenet":
        return  # transformers has no checkpointing for it
    model, inputs, _ = adapt(method, architecture)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    plain = gradients()
    model.activation_checkpointing_enable()
    if method == "prefix_tuning" and architecture in ("t5", "bart", "whisper"):
        with pytest.raises(TrainingError, match="gradient checkpointing drops caches"):
            gradients()
        return
    again = gradients()
    assert plain.keys() == again.keys()
    assert all(close(again[n], g, 1e-5) for n, g in plain.items())


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit", "whisper"])
def test_a_mixed_batch_of_methods_equals_each_row_alone(architecture: str) -> None:
    base, inputs, task = build(architecture)
    inputs = {k: v for k, v in inputs.items() if k != "labels" or architecture in ("t5", "whisper")}
    model = afina.get_peft_model(base, get_method("lora").make_config(task_type=task), "a")
    model.add_adapter("b", get_method("ia3").make_config(task_type=task))
    for name in ("a", "b"):
        perturb(model.adapters, name, 0.3)
    model.eval()
    names = ["b", BASE_ROW, "a"]
    mixed = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        if name == BASE_ROW:
            with model.disable_adapter():
                expected = model(**alone).logits
        else:
            model.set_adapter(name)
            expected = model(**alone).logits
        assert close(mixed[row], expected[0], 1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "bart"])
def test_generate_with_one_adapter_a_row(architecture: str, beams: int) -> None:
    base, inputs, task = build(architecture)
    model = afina.get_peft_model(base, get_method("lora").make_config(task_type=task, target_modules="all-linear"), "a")
    model.add_adapter("b", get_method("lora").make_config(task_type=task))
    for name in ("a", "b"):
        perturb(model.adapters, name, 0.6)
    model.eval()
    names = ["b", BASE_ROW, "a"]
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    mixed = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], adapter_names=names, **settings
    )
    for row, name in enumerate(names):
        alone = {k: inputs[k][row : row + 1] for k in ("input_ids", "attention_mask")}
        if name == BASE_ROW:
            with model.disable_adapter():
                expected = model.generate(**alone, **settings)
        else:
            model.set_adapter(name)
            expected = model.generate(**alone, **settings)
        assert mixed[row].tolist()[: expected.shape[1]] == expected[0].tolist()
    assert model.adapters.runtime.state.rows is None


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_generate_from_a_prompt_is_greedy_over_forward_and_padding_does_not_matter(method: str, architecture: str) -> None:
    model, inputs, _ = adapt(method, architecture)
    ids = inputs["input_ids"][:1]
    tokens = ids
    for _ in range(5):
        step = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, step], dim=1)
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for cache in (True, False):
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=cache, **settings)
        assert out.tolist() == tokens.tolist()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    out = model.generate(input_ids=padded, attention_mask=(padded != 0).long(), **settings)
    assert out[0, 3:].tolist() == tokens[0].tolist()


def test_a_prompt_and_a_lora_work_together() -> None:
    """Prompts are inputs, LoRA is advice around layers: both may be active."""
    model, inputs, _ = adapt("prompt_tuning", "llama")
    prompt_alone = model(**inputs).logits
    model.add_adapter("lora", get_method("lora").make_config(task_type="CAUSAL_LM"))
    perturb(model.adapters, "lora", 0.3)
    model.set_adapter(["default", "lora"])
    both = model(**inputs).logits
    assert both.shape == prompt_alone.shape
    assert not close(both, prompt_alone)
    model.set_adapter("default")
    assert torch.equal(model(**inputs).logits, prompt_alone)


def test_an_error_leaves_the_model_as_it_was() -> None:
    base, inputs, _ = build("llama")
    before = base(**inputs).logits
    trainable = [p.requires_grad for p in base.parameters()]
    with pytest.raises(TargetError):
        afina.get_peft_model(base, afina.LoraConfig(target_modules=["q_proj", "qqq_proj"]))
    assert torch.equal(base(**inputs).logits, before)
    assert [p.requires_grad for p in base.parameters()] == trainable
    afina.get_peft_model(base, afina.LoraConfig(target_modules=["q_proj"]))
