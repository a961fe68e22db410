"""Combining LoRA adapters into a new one (T11).

What is combined is what each adapter adds to the weight, with its own scaling, whatever its kind (LoRA, rank-stabilised,
DoRA): never the factors, whose products would give cross terms. A linear combination of low-rank matrices has at most
the sum of their ranks and is kept exactly; `svd_rank` truncates it, and the relative error of that is reported. Pruning
and sign election act on the full matrix of a layer, one layer at a time.

TIES: Yadav et al. 2023, https://arxiv.org/abs/2306.01708. DARE: Yu et al. 2023, https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from afina.core.adapter import Chain, SavedModule
from afina.core.injection import AdapterSet
from afina.core.registry import method_for
from afina.errors import ConfigError, Problems, did_you_mean

__all__ = ["COMBINATIONS", "combine"]

COMBINATIONS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


def combine(
    adapters: AdapterSet,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    combination_type: str = "linear",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> float:
    """Add an adapter `new_name` that adds the combination of what `names` add, times `weights`.

    Returns the relative error of truncation, over all layers: |combined - wanted| / |wanted| (Frobenius), 0.0 when exact.
    """
    _check(adapters, names, weights, new_name, combination_type, svd_rank, density, majority_sign_method)
    if len(names) == 1 and weights[0] == 1.0 and combination_type in ("linear", "cat", "svd") and svd_rank is None:
        _copy(adapters, names[0], new_name)
        return 0.0
    factors, biases, wrong, size = {}, {}, 0.0, 0.0
    for key, layer in adapters.layers.items():
        held = [(layer.adapters[n], w) for n, w in zip(names, weights, strict=True) if n in layer.adapters]
        held = [(a, w) for a, w in held if not isinstance(a, SavedModule)]
        if not held:
            continue
        low_rank = [a for a, _ in held if type(a).__name__ == "LoRA"]
        linear = combination_type in ("linear", "cat", "svd")
        if linear and len(low_rank) == len(held) and layer.view.kind != "parameter":
            up, down, error, norm = _thin([(a, w) for a, w in held], svd_rank)
        else:
            deltas = [_delta(layer, a) for a, _ in held]
            full = _merge_full(deltas, [w for _, w in held], combination_type, density, majority_sign_method)
            rank = svd_rank or (None if linear else max(_rank(a) for a, _ in held))
            up, down, error, norm = _factor(full, rank)
        factors[key], wrong, size = (up, down), wrong + error**2, size + norm**2
        shifts = [(b, w) for a, w in held if (b := a.delta_bias()) is not None]  # type: ignore[operator]
        if shifts:
            biases[key] = sum(b.detach() * w for b, w in shifts)
    _add(adapters, names, new_name, factors, biases)
    return (wrong / size) ** 0.5 if size else 0.0


def _check(
    adapters: AdapterSet, names: Sequence[str], weights: Sequence[float], new_name: str, kind: str,
    svd_rank: int | None, density: float | None, majority: str,
) -> None:  # fmt: skip
    adapters.check_names(names)
    adapters.check_new_name(new_name)
    problems = Problems("add_weighted_adapter")
    if not names:
        problems.add("adapters is empty: name at least one")
    if len(names) != len(weights):
        problems.add(f"{len(names)} adapters but {len(weights)} weights")
    if not all(math.isfinite(weight) for weight in weights):
        problems.add(f"weights={list(weights)}: expected finite numbers")
    if kind not in COMBINATIONS:
        problems.add(f"combination_type={kind!r} is not known.{did_you_mean(kind, COMBINATIONS)}")
    if svd_rank is not None and svd_rank < 1:
        problems.add(f"svd_rank={svd_rank}: expected at least 1")
    prunes = kind.startswith(("ties", "dare", "magnitude"))
    if prunes and (density is None or not 0 < density <= 1):
        problems.add(f"combination_type={kind!r} needs density, the share of values kept, above 0 and at most 1")
    if majority not in ("total", "frequency"):
        problems.add(f"majority_sign_method={majority!r}: expected 'total' or 'frequency'")
    for name in names:
        config = adapters.configs[name]
        if config.peft_type != "LORA":
            problems.add(f"{name!r} is a {config.peft_type} adapter; adapters with low-rank factors can be combined")
        elif getattr(config, "bias", "none") != "none":
            problems.add(f"{name!r} trains biases of the base (bias={config.bias!r}), which cannot be weighted")  # type: ignore[attr-defined]
        elif any(isinstance(a, Chain) or layer.view.kind == "parameter" for layer in adapters.layers.values()
                 if (a := layer.adapters._modules.get(name)) is not None):  # fmt: skip
            problems.add(f"{name!r} holds more than one low-rank matrix a layer (tokens or fused experts)")
    saved = [n for n in names if adapters.injected[n].saved]
    if len(saved) > 1:
        problems.add(f"{' and '.join(saved)} each hold modules trained whole (modules_to_save), which cannot be combined")
    problems.raise_as(ConfigError)


def _copy(adapters: AdapterSet, name: str, new_name: str) -> None:
    adapters.add(new_name, adapters.configs[name], initialise=False, strict=False)
    for layer in adapters.layers.values():
        if name in layer.adapters:
            layer.adapters[new_name].load_state_dict(layer.adapters[name].state_dict())


def _rank(adapter: Any) -> int:
    return int(adapter.r)


def _delta(layer: Any, adapter: Any) -> torch.Tensor:
    """What an adapter adds to the canonical weight, in float32."""
    with torch.no_grad():
        weight = layer.view.weight().float()
        merged, _ = adapter.merge_into(weight, None)
        return merged - weight if type(adapter).__name__ != "LoRA" else adapter.delta_weight().float()


def _thin(held: list[tuple[Any, float]], rank: int | None) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Exact sum of low-rank matrices without ever making a full one; smallest rank, or truncated to `rank`."""
    with torch.no_grad():
        up = torch.cat([a.lora_B.flatten(1).double() * (w * a.scaling) for a, w in held], dim=1)
        down = torch.cat([a.lora_A.flatten(1).double() for a, _ in held], dim=0)
        left, mid_left = torch.linalg.qr(up)
        right, mid_right = torch.linalg.qr(down.T)
        u, s, v = torch.linalg.svd(mid_left @ mid_right.T, full_matrices=False)
        return _cut(left @ u, s, v @ right.T, rank)


def _factor(full: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    u, s, v = torch.linalg.svd(full.double(), full_matrices=False)
    return _cut(u, s, v, rank)


def _cut(
    u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Factors of the largest singular values, with the norms of what is cut off and of the whole."""
    useful = max(1, int((s > s.max() * 1e-9).sum()))
    keep = min(useful, rank) if rank else useful
    root = s[:keep].sqrt()
    return (u[:, :keep] * root).float(), (v[:keep] * root[:, None]).float(), float(s[keep:].norm()), float(s.norm())


def _merge_full(
    deltas: list[torch.Tensor], weights: list[float], kind: str, density: float | None, majority: str
) -> torch.Tensor:
    stack = torch.stack(deltas)
    scale = torch.tensor(weights, device=stack.device).reshape(-1, *[1] * (stack.dim() - 1))
    if kind.startswith("dare"):
        assert density is not None
        stack = stack * torch.bernoulli(torch.full_like(stack, density)) / density
    elif kind.startswith(("ties", "magnitude")):
        assert density is not None
        stack = torch.stack([_largest(delta, density) for delta in stack])
    weighted = stack * scale
    if "ties" not in kind:
        return weighted.sum(0)
    votes = weighted.sum(0) if majority == "total" else weighted.sign().sum(0)
    agree = weighted.sign() == torch.where(votes >= 0, 1.0, -1.0)
    counted = (agree & (weighted != 0)).sum(0).clamp(min=1)
    return (weighted * agree).sum(0) / counted


def _largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The matrix with all but the largest share of its values set to zero."""
    keep = max(1, round(density * delta.numel()))
    kept = torch.zeros_like(delta).flatten()
    places = delta.abs().flatten().topk(keep).indices
    kept[places] = delta.flatten()[places]
    return kept.reshape(delta.shape)


def _add(
    adapters: AdapterSet,
    names: Sequence[str],
    new_name: str,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    biases: dict[str, torch.Tensor],
) -> None:
    first: Any = adapters.configs[names[0]]
    source = next((n for n in names if adapters.injected[n].saved), names[0])
    ranks = {key: down.shape[0] for key, (_, down) in factors.items()}
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {re.escape(key): rank for key, rank in ranks.items() if rank != most}
    config = dataclasses.replace(
        first, r=most, lora_alpha=most, rank_pattern=pattern, alpha_pattern=dict(pattern), use_rslora=False, use_dora=False,
        lora_bias=bool(biases), lora_dropout=0.0, target_modules=sorted(factors), exclude_modules=None,
        layers_to_transform=None, layers_pattern=None, modules_to_save=adapters.configs[source].modules_to_save,  # type: ignore[attr-defined]
    )  # fmt: skip
    assert method_for(config).name == "lora"
    adapters.add(new_name, config, initialise=False, strict=False)
    with torch.no_grad():
        for key, layer in adapters.layers.items():
            new: Any = layer.adapters._modules.get(new_name)
            if isinstance(new, SavedModule):
                new.load_state_dict(layer.adapters[source].state_dict())
            elif new is not None:
                up, down = factors[key]
                new.lora_B.copy_(up.reshape(new.lora_B.shape))
                new.lora_A.copy_(down.reshape(new.lora_A.shape))
                if biases:
                    new.lora_bias.copy_(biases.get(key, torch.zeros_like(new.lora_bias)))
