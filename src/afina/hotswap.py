"""One adapter in the place of another, in PEFT's names, so that a compiled model is not compiled again.

Compiled code reads the active adapters without their names: it fits every adapter of the same layers, shapes, kind and
scale, and `set_adapter` and `load_adapter` between such adapters cost no compilation. `hotswap_adapter` goes further: the
values of another adapter are written into the parameters that are there. Its rank may be smaller (the rest is zeros) and
its scale another (B takes the ratio), so that shapes and numbers that were compiled in stay as they are.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from afina.core.config import AdapterConfig, TargetedConfig, changed
from afina.core.injection import AdapterSet
from afina.errors import AdapterNameError, CheckpointError, ConfigError, MergeError, Problems, shortened
from afina.methods.lora import LoRA, LoraConfig, TiedLoRA

__all__ = ["hotswap_adapter", "prepare_model_for_compiled_hotswap"]

_INCOMING = "afina_incoming"
_OF_RANK = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# no part of what is computed of the parameters
_FREE = ("lora_dropout", "init_lora_weights", "loftq_config", "init_ia3_weights", "fan_in_fan_out")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: Any, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Write the adapter of a folder or hub repository into the parameters of `adapter_name`, which keeps its name, its
    parameters, their rank and their scale.

    Of LoRA the rank may be smaller and the scale another; layers that the new one does not adapt are left as the base has
    them. All else has to be alike. Raises CheckpointError with all that does not fit, and then nothing has changed.
    `model` may be a compiled one. Other options are those of `load_adapter`; `torch_device` changes nothing.
    """
    model = _bare(model)
    adapters: AdapterSet = model.adapters  # type: ignore[assignment]
    adapters.check_names([adapter_name])
    if adapter_name in adapters.merged:
        raise MergeError(f"adapter {adapter_name!r} is merged into the base; call unmerge_adapter() first")
    model.load_adapter(model_name_or_path, _INCOMING, **kwargs)  # type: ignore[operator]
    try:
        old, new = adapters.configs[adapter_name], adapters.configs[_INCOMING]
        problems = Problems(f"{model_name_or_path} in the place of {adapter_name!r}")
        _compare(old, new, problems)
        pairs = [*_pairs(adapters, adapter_name, problems)] if not problems.found else []
        problems.raise_as(CheckpointError, "Load it under a name of its own: load_adapter, then set_adapter.")
        with torch.no_grad():
            for there, coming in pairs:
                _write(there, coming)
        if isinstance(new, LoraConfig):
            adapters.configs[adapter_name] = changed(old, lora_dropout=new.lora_dropout)
    finally:
        adapters.remove(_INCOMING)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: str = "error",
) -> None:
    """Make room in every LoRA of the model for adapters of up to `target_rank`: its factors are filled up with zeros, which
    changes no output. To be called before the model is compiled and before an optimizer is made.

    Without `target_rank` there is nothing to prepare: another scale needs no room. The configurations in `peft_config` are
    brought into line, so `config` changes nothing. `check_compiled` says what to do about a model that is compiled already:
    "error", "warn" or "ignore".
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled={check_compiled!r}: expected 'error', 'warn' or 'ignore'")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        message = "the model is compiled already, and other ranks compile it again; prepare it before torch.compile"
        if check_compiled == "error":
            raise ConfigError(message)
        if check_compiled == "warn":
            warnings.warn(message, stacklevel=2)
    adapters: AdapterSet = _bare(model).adapters
    named = {name: own for name, own in adapters.configs.items() if isinstance(own, LoraConfig)}
    if not named:
        raise AdapterNameError("there is no LoRA in the model; load the first one before it is prepared")
    if target_rank is None:
        return
    problems = Problems("prepare_model_for_compiled_hotswap")
    for name in named:
        for key, lora in _products(adapters, name):
            if lora.r > target_rank:
                problems.add(f"{key}: the rank of {name!r} is {lora.r}, more than target_rank={target_rank}")
            elif not _plain(lora):
                problems.add(f"{key}: a layer in groups, or a stack of matrices, has its ranks in groups: no room is made")
    problems.raise_as(ConfigError)
    for name, own in named.items():
        filled = adapters.configs[name] = changed(own, r=target_rank, rank_pattern={}, alpha_pattern={})
        for _, lora in _products(adapters, name):
            ratio, lora.r, lora.scaling = lora.scaling / filled.scaling, target_rank, filled.scaling
            if isinstance(lora, TiedLoRA):
                continue  # its factors are the embedding's
            down, up = lora.lora_A, lora.lora_B
            lora.lora_A = nn.Parameter(_filled(down, 0, target_rank), requires_grad=down.requires_grad)
            lora.lora_B = nn.Parameter(_filled(up * ratio, 1, target_rank), requires_grad=up.requires_grad)
            if "lora_bias" in lora._parameters:
                with torch.no_grad():
                    lora.lora_bias.mul_(ratio)


def _bare(model: Any) -> Any:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(getattr(model, "adapters", None), AdapterSet):
        raise ConfigError(f"a {type(model).__name__} has no adapters; expected a model of get_peft_model or from_pretrained")
    return model


def _compare(old: AdapterConfig, new: AdapterConfig, problems: Problems) -> None:
    """Options that change what an adapter does and are not in its parameters."""
    if type(old) is not type(new):
        problems.add(f"it is of {type(new).__name__}, and expected is one of {type(old).__name__}")
        return
    free = {"use_dora", *_FREE, *(_OF_RANK if isinstance(old, LoraConfig) else ())}  # DoRA is seen layer by layer
    free |= {f.name for f in dataclasses.fields(TargetedConfig)}
    for name in (f.name for f in dataclasses.fields(old) if f.name not in free):
        one, other = getattr(old, name), getattr(new, name)
        if one != other:
            problems.add(f"{name}={other!r}, and expected is {one!r}, as the adapter has that is there")


def _pairs(adapters: AdapterSet, name: str, problems: Problems) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Modules with parameters, as they are and as they come (None for a layer that the new adapter does not have)."""
    held = {key: layer.adapters for key, layer in adapters.layers.items()} | {"the prompt": adapters.prompts}
    extra = [key for key, own in held.items() if _INCOMING in own and name not in own]
    if extra:
        problems.add(f"it adapts {shortened(extra)}, which the adapter that is there does not")
    for key, own in held.items():
        if name not in own:
            continue
        there, coming = own[name], own._modules.get(_INCOMING)
        if coming is None:
            if isinstance(there, LoRA) and type(there).forward is LoRA.forward and not isinstance(there, TiedLoRA):
                yield there, None
            else:
                problems.add(f"it does not have {key}, and a {type(there).__name__} there cannot be put out")
            continue
        modules, others = dict(there.named_modules()), dict(coming.named_modules())
        if [*map(type, modules.values())] != [*map(type, others.values())]:
            problems.add(f"{key}: a {type(coming).__name__}, and expected is a {type(there).__name__}")
            continue
        for inner, module in modules.items():
            for parameter, tensor in module._parameters.items():
                given = others[inner]._parameters.get(parameter)
                if not _fits(module, parameter, tensor, given):
                    shapes = [None if t is None else [*t.shape] for t in (given, tensor)]
                    said = f"{key}: {parameter} has the shape {shapes[0]}, and expected is {shapes[1]}"
                    problems.add(said + _cure(module, others[inner]))
            yield module, others[inner]


def _fits(module: nn.Module, name: str, there: Any, coming: Any) -> bool:
    if there is None or coming is None:
        return there is coming
    if there.shape == coming.shape:
        return True
    if not isinstance(module, LoRA) or not _plain(module) or name not in ("lora_A", "lora_B"):
        return False
    dim = 0 if name == "lora_A" else 1
    one, other = [*there.shape], [*coming.shape]
    return other.pop(dim) <= one.pop(dim) and one == other


def _cure(there: Any, coming: Any) -> str:
    if not isinstance(there, LoRA) or coming.r <= there.r:
        return ""
    return f"; prepare_model_for_compiled_hotswap(model, target_rank={coming.r}) beforehand makes room"


def _write(there: nn.Module, coming: nn.Module | None) -> None:
    if coming is None:
        there.lora_B.zero_()  # type: ignore[operator]
        if "lora_bias" in there._parameters:
            there.lora_bias.zero_()  # type: ignore[operator]
        return
    product = isinstance(there, LoRA)
    ratio = coming.scaling / there.scaling if product else 1.0  # type: ignore[operator, arg-type]
    for name, tensor in there._parameters.items():
        value: Any = coming._parameters[name]
        if tensor is None:
            continue
        if product and name in ("lora_B", "lora_bias"):
            value = value * ratio
        if product and name in ("lora_A", "lora_B"):
            dim = 0 if name == "lora_A" else 1
            value = _filled(value, dim, tensor.shape[dim])
        tensor.copy_(value)
    for name, buffer in there._buffers.items():
        if buffer is not None:
            buffer.copy_(coming._buffers[name])  # type: ignore[arg-type]
    if product:
        there.p = coming.p


def _products(adapters: AdapterSet, name: str) -> Iterator[tuple[str, Any]]:
    for key, layer in adapters.layers.items():
        if name in layer.adapters:
            for module in layer.adapters[name].modules():
                if isinstance(module, LoRA):
                    yield key, module


def _plain(lora: Any) -> bool:
    """Whether the rank is one whole dimension of each factor."""
    return lora.matrices == 1 and getattr(lora.view.layer, "groups", 1) == 1


def _filled(factor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """The factor with zeros behind its ranks, which are in dimension `dim`."""
    if factor.shape[dim] == rank:
        return factor.detach()
    made = factor.new_zeros([rank if i == dim else size for i, size in enumerate(factor.shape)])
    made.narrow(dim, 0, factor.shape[dim]).copy_(factor.detach())
    return made
