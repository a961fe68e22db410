"""PEFT's functions: wrapping a model, injecting into one, reading and writing the tensors of an adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from afina.core import checkpoint
from afina.core.config import AdapterConfig, config_from_dict
from afina.core.injection import AdapterSet
from afina.core.registry import method_for
from afina.core.vocabulary import resized_embeddings, take_embeddings
from afina.errors import CheckpointError, ConfigError, TargetError, shortened
from afina.model import MODEL_TYPES, PeftModel

__all__ = [
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """The model with freshly initialised adapters around the layers that `peft_config` means; all else is frozen.

    The model is changed in place. Raises TargetError, ConfigError or AlreadyAdaptedError before anything is changed.
    `revision` is the base's on the hub. `mixed` and `low_cpu_mem_usage` are PEFT's and change nothing: adapters of
    different methods always go together, and making one costs no more than its own parameters.
    """
    if not isinstance(peft_config, AdapterConfig):
        raise ConfigError(f"peft_config is a {type(peft_config).__name__}; expected a configuration such as LoraConfig()")
    if revision is not None:
        peft_config = dataclasses.replace(peft_config, revision=revision)
    cls = MODEL_TYPES.get(str(peft_config.task_type), PeftModel)
    return cls(model, peft_config, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """The model itself, with adapters inside and no wrapper around it; a second call adds a second adapter, active too.

    With `state_dict`, the layers to adapt are those its keys name. `low_cpu_mem_usage` changes nothing.
    """
    if method_for(peft_config).kind == "prompt":
        raise ConfigError(
            f"{type(peft_config).__name__} acts on the whole model, so it cannot be injected; use get_peft_model"
        )
    adapters = AdapterSet.of(model) or AdapterSet(model)
    if state_dict is not None:
        paths = {key.removeprefix(checkpoint.PREFIX) for key in state_dict}
        named = [name for name in adapters.map.modules if any(_is_inside(path, name) for path in paths)]
        deepest = [name for name in named if not any(other.startswith(f"{name}.") for other in named)]
        if not deepest:
            raise TargetError(f"state_dict names no module of {type(model).__name__}: {shortened(sorted(paths), 4)}")
        peft_config = dataclasses.replace(peft_config, target_modules=deepest)  # type: ignore[call-arg]
    try:
        adapters.add(adapter_name, peft_config)
    except Exception:
        if not adapters.configs:
            adapters.unload()
        raise
    adapters.set_active((*adapters.active, adapter_name), trainable=not peft_config.inference_mode)
    model.peft_config = adapters.configs  # type: ignore[assignment]
    return model


def _is_inside(key: str, module: str) -> bool:
    return key.startswith(f"{module}.")


def _adapters_of(model: nn.Module) -> AdapterSet:
    if isinstance(model, PeftModel):
        return model.adapters
    found = AdapterSet.of(model)
    if found is None:
        raise ConfigError(f"this {type(model).__name__} has no adapters; use get_peft_model or inject_adapter_in_model")
    return found


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, torch.Tensor]:
    """Tensors of one adapter under their keys in PEFT's files; values from `state_dict` (names of the live model) where
    it is given, for example gathered from shards. `save_embedding_layers` adds the base's embeddings: True, False, or
    "auto" for those that were resized. `unwrap_compiled` looks below `torch.compile`."""
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    adapters = _adapters_of(model)
    live = checkpoint.adapter_state(adapters, adapter_name)
    live = {**resized_embeddings(adapters, live, save_embedding_layers), **live}
    if state_dict is None:
        return {key: tensor.detach() for key, tensor in live.items()}
    names = {id(p): n for n, p in model.named_parameters()}
    return {key: state_dict.get(names.get(id(tensor), ""), tensor.detach()) for key, tensor in live.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> checkpoint.LoadReport:
    """Put tensors under PEFT's keys into a live adapter; returns which keys fitted and which did not.

    Raises CheckpointError where a shape differs, unless `ignore_mismatched_sizes`. `low_cpu_mem_usage` changes nothing.
    """
    adapters, state = _adapters_of(model), dict(peft_model_state_dict)
    expected = checkpoint.adapter_state(adapters, adapter_name)
    wrong = [k for k, t in state.items() if k in expected and t.shape != expected[k].shape]
    if wrong and not ignore_mismatched_sizes:
        shapes = [f"{k} is {list(state[k].shape)}, expected {list(expected[k].shape)}" for k in wrong]
        raise CheckpointError(
            f"the state dict: {shortened(shapes, 8)}. Leave them as they are with ignore_mismatched_sizes=True"
        )
    with torch.no_grad():
        for own, stored in take_embeddings(adapters, state, expected, "the state dict"):
            own.copy_(stored)
    return checkpoint.assign(state, expected, "the state dict", strict=False, layers=adapters.paths)


def get_peft_config(config_dict: dict[str, Any]) -> AdapterConfig:
    """The configuration that a table of options means; its class is found by `peft_type`."""
    return config_from_dict(config_dict)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = False,
) -> Any:
    """Freeze a quantised base and turn on gradient checkpointing.

    Nothing is cast to float32: adapters keep their own float32 parameters and norms of transformers compute in float32
    where they need it, so a blanket cast of embeddings and head would cost memory for nothing (T33); for the same reason
    `auto_clear_cache` has nothing to clear.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if use_gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs or {"use_reentrant": False})
    return model
