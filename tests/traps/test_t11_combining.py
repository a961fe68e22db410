"""T11: `add_weighted_adapter` adds cross terms elsewhere, or ignores scaling, DoRA and biases. Here deltas are combined."""

import warnings

import pytest
import torch
from trap_models import gpt2, llama, logits, stir

from afina import IA3Config, LoraConfig, get_peft_model
from afina.errors import AdapterNameError, ConfigError

TARGETS = ["q_proj", "down_proj"]
KINDS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 5, "lora_alpha": 3, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 7, "use_dora": True},
    "patterns": {"r": 4, "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"layers.1.self_attn.q_proj": 11}},
    "embedding": {"r": 3, "target_modules": ["q_proj", "embed_tokens"]},
}


def build(*kinds, base=llama):
    """A model with one stirred adapter for each kind."""
    model = None
    for i, kind in enumerate(kinds):
        config = LoraConfig(**({"target_modules": TARGETS} | KINDS[kind]))
        if model is None:
            model = get_peft_model(base(), config, adapter_name=f"a{i}")
        else:
            model.add_adapter(f"a{i}", config)
        stir(model, f"a{i}", seed=10 + i, scale=0.2)
    return model


def deltas(model, name):
    """What an adapter adds to each stored weight, measured by merging it."""
    found = {}
    before = {key: layer.view.weight().detach().clone().double() for key, layer in model.adapters.layers.items()}
    model.merge_adapter([name])
    for key, layer in model.adapters.layers.items():
        found[key] = layer.view.weight().detach().double() - before[key]
    model.unmerge_adapter()
    return found


def wanted(model, names, weights):
    total = {}
    for name, weight in zip(names, weights, strict=True):
        for key, delta in deltas(model, name).items():
            total[key] = total.get(key, 0) + weight * delta
    return total


def relative(got, want):
    size = sum(w.norm() ** 2 for w in want.values()) ** 0.5
    return float(sum((got[k] - w).norm() ** 2 for k, w in want.items()) ** 0.5 / size)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize(
    "kinds", [("plain", "rslora"), ("plain", "dora"), ("patterns", "rslora", "plain"), ("embedding", "plain")], ids=str
)
@pytest.mark.parametrize("weights", [(0.7, 0.4, 1.3), (1.0, -1.0, -0.5)], ids=str)
def test_t11_linear_combinations_are_exact(kinds, kind, weights):
    model = build(*kinds)
    names, weights = [f"a{i}" for i in range(len(kinds))], weights[: len(kinds)]
    error = model.add_weighted_adapter(names, weights, "mix", combination_type=kind)
    assert error < 1e-6
    assert relative(deltas(model, "mix"), wanted(model, names, weights)) < 1e-5


def test_t11_the_naive_way_has_cross_terms():
    """The mean of factors is not the mean of products."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False), "a")
        model.add_adapter("b", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mix", combination_type="linear")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    want = 0.5 * layer.get_delta_weight("a") + 0.5 * layer.get_delta_weight("b")
    assert (layer.get_delta_weight("mix") - want).norm() / want.norm() > 0.1


def test_t11_activations_follow():
    model = build("plain", "rslora")
    model.add_weighted_adapter(["a0", "a1"], [0.5, -0.25], "mix")
    model.set_adapter("mix")
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("name", KINDS)
def test_t11_one_adapter_of_weight_one_is_bit_exact(name, kind):
    model = build(name)
    expected = logits(model)
    assert model.add_weighted_adapter(["a0"], [1.0], "copy", combination_type=kind) == 0.0
    model.set_adapter("copy")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("kinds", [("plain", "rslora"), ("plain", "dora")], ids=str)
def test_t11_the_error_of_truncation_is_the_measured_one(kinds, rank, caplog):
    model = build(*kinds)
    error = model.add_weighted_adapter(["a0", "a1"], [0.7, 0.4], "mix", combination_type="svd", svd_rank=rank)
    want, got = wanted(model, ["a0", "a1"], [0.7, 0.4]), deltas(model, "mix")
    assert error > 1e-3
    assert error == pytest.approx(relative(got, want), rel=1e-3)
    assert "relative error" in caplog.text
    for key, delta in want.items():  # no matrix of that rank is nearer
        best = torch.linalg.svdvals(delta)[rank:].norm()
        assert float((got[key] - delta).norm()) == pytest.approx(float(best), rel=1e-3, abs=1e-5)


PRUNING = [
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@pytest.mark.parametrize("kind", PRUNING)
def test_t11_nothing_pruned_from_one_adapter_is_the_adapter(kind):
    model = build("plain")
    model.add_weighted_adapter(["a0"], [0.5], "mix", combination_type=kind, density=1.0)
    assert relative(deltas(model, "mix"), wanted(model, ["a0"], [0.5])) < 1e-4


@pytest.mark.parametrize("kind", ["dare_linear", "magnitude_prune"])
def test_t11_nothing_pruned_from_two_is_their_sum(kind):
    model = build("plain", "rslora")
    model.add_weighted_adapter(["a0", "a1"], [0.5, -0.3], "mix", combination_type=kind, density=1.0, svd_rank=8)
    assert relative(deltas(model, "mix"), wanted(model, ["a0", "a1"], [0.5, -0.3])) < 1e-4


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_t11_magnitude_pruning_keeps_the_largest(density):
    model = build("plain")
    model.add_weighted_adapter(["a0"], [1.0], "mix", combination_type="magnitude_prune", density=density, svd_rank=20)
    got = deltas(model, "mix")
    for key, full in deltas(model, "a0").items():
        keep = round(density * full.numel())
        limit = full.abs().flatten().sort(descending=True).values[keep - 1]
        kept = torch.where(full.abs() >= limit, full, torch.zeros_like(full))
        torch.testing.assert_close(got[key], kept, rtol=1e-3, atol=1e-4)


def test_t11_ties_keeps_what_agrees():
    model = build("plain", "rslora")
    model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "mix", combination_type="ties", density=1.0, svd_rank=20)
    got = deltas(model, "mix")
    one, two = deltas(model, "a0"), deltas(model, "a1")
    for key in got:
        stack = torch.stack([one[key], two[key]])
        agree = stack.sign() == stack.sum(0).sign()
        want = (stack * agree).sum(0) / agree.sum(0)
        torch.testing.assert_close(got[key], want, rtol=1e-3, atol=1e-4)


def test_t11_dare_is_right_on_average():
    model = build("plain")
    want = deltas(model, "a0")
    total = {key: torch.zeros_like(delta) for key, delta in want.items()}
    for i in range(40):
        model.add_weighted_adapter(["a0"], [1.0], f"mix{i}", combination_type="dare_linear", density=0.5, svd_rank=20)
        for key, delta in deltas(model, f"mix{i}").items():
            total[key] += delta / 40
        model.delete_adapter(f"mix{i}")
    assert relative(total, want) < 0.25  # one draw is off by about 1


def test_t11_trained_biases_of_lora_are_combined():
    config = {"target_modules": ["c_attn"], "lora_bias": True}
    model = get_peft_model(gpt2(), LoraConfig(r=3, lora_alpha=7, **config), adapter_name="a0")
    model.add_adapter("a1", LoraConfig(r=2, use_rslora=True, **config))
    for i in range(2):
        stir(model, f"a{i}", seed=i)
    biases = {}
    for name in ("a0", "a1"):
        before = {k: layer.view.bias().detach().clone() for k, layer in model.adapters.layers.items()}
        model.merge_adapter([name])
        biases[name] = {k: layer.view.bias() - before[k] for k, layer in model.adapters.layers.items()}
        model.unmerge_adapter()
    model.add_weighted_adapter(["a0", "a1"], [0.5, 2.0], "mix")
    before = {k: layer.view.bias().detach().clone() for k, layer in model.adapters.layers.items()}
    model.merge_adapter(["mix"])
    for key, layer in model.adapters.layers.items():
        want = 0.5 * biases["a0"][key] + 2.0 * biases["a1"][key]
        torch.testing.assert_close(layer.view.bias() - before[key], want, rtol=1e-4, atol=1e-4)


def test_t11_what_cannot_be_combined_is_said():
    model = build("plain", "rslora")
    for arguments, message in (
        ({"adapters": [], "weights": []}, "name at least one"),
        ({"adapters": ["a0", "a1"], "weights": [1.0]}, "2 adapters but 1 weights"),
        ({"adapters": ["a0"], "weights": [1.0], "combination_type": "linaer"}, "Did you mean 'linear'"),
        ({"adapters": ["a0"], "weights": [1.0], "combination_type": "ties"}, "density"),
        ({"adapters": ["a0"], "weights": [1.0], "combination_type": "ties", "density": 1.5}, "at most 1"),
        ({"adapters": ["a0"], "weights": [1.0], "combination_type": "svd", "svd_rank": 0}, "svd_rank=0"),
        ({"adapters": ["a0"], "weights": [1.0], "svd_clamp": 0.5}, "svd_clamp"),
        ({"adapters": ["a0"], "weights": [float("nan")]}, "finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.add_weighted_adapter(adapter_name="mix", **arguments)
    with pytest.raises(AdapterNameError, match="Did you mean"):
        model.add_weighted_adapter(["a0", "b1"], [1.0, 1.0], "mix")
    with pytest.raises(AdapterNameError, match="there already"):
        model.add_weighted_adapter(["a0"], [1.0], "a1")
    other = get_peft_model(llama(), IA3Config(), adapter_name="a0")
    with pytest.raises(ConfigError, match="IA3"):
        other.add_weighted_adapter(["a0"], [1.0], "mix")
    saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    two = get_peft_model(llama(), saved, adapter_name="a0")
    two.add_adapter("a1", saved)
    with pytest.raises(ConfigError, match="modules_to_save"):
        two.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "mix")
    assert list(model.peft_config) == ["a0", "a1"]
