"""Every method on every kind of layer it adapts, in awkward shapes. A method is here because it is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from afina.core.injection import AdapterSet
from afina.core.layers import view_of
from afina.core.registry import Method, methods
from afina.methods.lora import LoraConfig


class Experts(nn.Module):
    """Three matrices in one parameter, as the fused experts of a mixture hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 11, 7))
        self.down_proj = nn.Parameter(torch.randn(3, 7, 11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.einsum("bti,eoi->beto", x, self.gate_up_proj).tanh()
        return torch.einsum("beto,eio->bti", inner, self.down_proj)


def vectors(n: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(5, 3, n)


def pictures(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(5, *shape)


def tokens() -> torch.Tensor:
    return torch.tensor([[0, 1, 12], [1, 5, 0], [3, 3, 3], [12, 1, 2], [4, 0, 1]])


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(7, 11), vectors(7)),
    "linear-no-bias": (lambda: nn.Linear(11, 7, bias=False), vectors(11)),
    "linear-out-below-r": (lambda: nn.Linear(13, 2), vectors(13)),
    "Conv1D": (lambda: Conv1D(11, 7), vectors(7)),
    "conv1d": (lambda: nn.Conv1d(3, 7, 5, stride=2, padding=2), pictures(3, 17)),
    "conv2d-dilated": (lambda: nn.Conv2d(3, 5, (3, 2), dilation=(2, 1), padding=1, bias=False), pictures(3, 11, 7)),
    "conv2d-groups": (lambda: nn.Conv2d(6, 9, 3, groups=3, stride=2), pictures(6, 7, 11)),
    "conv2d-depthwise": (lambda: nn.Conv2d(5, 5, 3, groups=5, padding="same"), pictures(5, 7, 7)),
    "conv2d-circular": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), pictures(3, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), pictures(2, 3, 5, 3)),
    "embedding": (lambda: nn.Embedding(13, 7), tokens),
    "embedding-scaled": (lambda: Gemma3TextScaledWordEmbedding(13, 7, 0, embed_scale=3.5), tokens),
    "layer-norm": (lambda: noisy(nn.LayerNorm(7)), vectors(7)),
    "rms-norm": (lambda: noisy(LlamaRMSNorm(7)), vectors(7)),
    "group-norm": (lambda: noisy(nn.GroupNorm(3, 6)), pictures(6, 7)),
    "batch-norm": (lambda: noisy(nn.BatchNorm1d(6)), pictures(6, 7)),
    "experts": (Experts, vectors(7)),
}


def noisy(module: nn.Module) -> nn.Module:
    """The module with its parameters moved by noise."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return module


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lora": [{}, {"use_rslora": True, "lora_alpha": 5, "r": 3}, {"lora_bias": True}, {"init_lora_weights": "gaussian"}],
    "ia3": [{"feedforward_modules": []}, {"feedforward_modules": ["layer"]}],
    "bottleneck": [{"placement": "houlsby", "bottleneck_size": 3}, {"placement": "parallel", "activation": "gelu"}],
    "trainable_tokens": [{"token_indices": [1, 0]}],
    "hra": [{"r": 4}],
}


@dataclass(frozen=True)
class Case:
    """One method, with some options, on one kind of layer."""

    method: Method
    layer: str
    variant: int = 0

    def __str__(self) -> str:
        return f"{self.method.name}{f'-{self.variant}' if self.variant else ''}-{self.layer}"

    def config(self, **options: Any) -> Any:
        options = {**(VARIANTS.get(self.method.name, [{}])[self.variant]), **options}
        if self.layer == "experts":
            return self.method.make_config(target_parameters=["gate_up_proj", "down_proj"], **options)
        return self.method.make_config(target_modules=["layer"], **options)

    def holder(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(1)
        return Holder(LAYERS[self.layer][0]()).to(dtype).eval()

    def input(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        torch.manual_seed(2)
        x = LAYERS[self.layer][1]()
        return x.to(dtype) if x.dtype.is_floating_point else x


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _fits(method: Method, layer: str, options: dict[str, Any]) -> bool:
    if layer == "experts":
        return "parameter" in method.adapter.kinds and not options.get("lora_bias")
    made = LAYERS[layer][0]()
    if view_of(made).kind not in method.adapter.kinds:
        return False
    needs_bias = method.name == "bitfit" or options.get("lora_bias")
    return not (needs_bias and getattr(made, "bias", None) is None)


CASES = [
    Case(method, layer, i)
    for method in methods().values()
    if method.kind == "layer"
    for i, options in enumerate(VARIANTS.get(method.name, [{}]))
    for layer in LAYERS
    if _fits(method, layer, options)
]
MERGEABLE = [case for case in CASES if case.method.adapter.mergeable]


def adapted(case: Case, name: str = "one", *, dtype: torch.dtype = torch.float32, noise: float = 0.3, **options: Any) -> Any:
    """A holder with one adapter whose parameters are moved away from where they start."""
    holder = case.holder(dtype)
    adapters = AdapterSet(holder)
    torch.manual_seed(3)
    adapters.add(name, case.config(**options))
    adapters.set_active(name)
    perturb(adapters, name, noise)
    return holder, adapters


def perturb(adapters: AdapterSet, name: str, noise: float = 0.3) -> None:
    """Move the parameters of one adapter by noise."""
    with torch.no_grad():
        for adapter in adapters.adapters(name):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)


def lora_for(case: Case) -> LoraConfig | None:
    """A LoRA on the same layer, where there can be one."""
    if case.layer == "experts":
        return LoraConfig(r=2, target_parameters=["gate_up_proj"], target_modules=[])
    if "norm" in case.layer:
        return None
    return LoraConfig(r=2, target_modules=["layer"])
