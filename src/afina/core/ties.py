"""Weights that several modules share (T6).

A tie is one Parameter object under several names. A merge puts new Parameters in place, so it never changes the other
side by accident; afterwards sides that came out equal are tied again, and where they differ the model's configuration
is made to say so, or saving and loading would tie them back together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from afina.core.adapted import AdaptedLayer
from afina.core.targets import ModuleMap

__all__ = ["tied_groups", "tied_names"]


class Ties:
    """Which parameter slots shared one tensor, by names of the bare model."""

    def __init__(self, groups: list[list[str]]):
        self.groups = groups

    def mend(self, model: nn.Module, *, untie: bool) -> None:
        """Tie again what came out equal; with `untie`, write down what did not."""
        for group in self.groups:
            slots = [_slot(model, path) for path in group]
            first: Any = slots[0][0]._parameters[slots[0][1]]
            if all(m._parameters[n] is first or _equal(m._parameters[n], first) for m, n in slots[1:]):
                for module, name in slots[1:]:
                    module._parameters[name] = first
            elif untie:
                _say_untied(model, set(group))


def _slot(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter now (a merge may have put another in its place), and the parameter's name."""
    *parts, name = path.split(".")
    for part in parts:
        model = model._modules[part]  # type: ignore[assignment]
        while isinstance(model, AdaptedLayer):
            model = model.base_layer
    return model, name


def _equal(one: Any, other: Any) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def tied_groups(model: nn.Module) -> Ties:
    """The ties of a model as it stands, by tensor identity."""
    slots: dict[int, list[str]] = {}
    places: set[tuple[int, str]] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if ".adapters." in f".{path}.":
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and (id(module), name) not in places:
                places.add((id(module), name))
                bare = f"{path}.{name}".replace(".base_layer.", ".")
                slots.setdefault(id(parameter), []).append(bare)
    return Ties([group for group in slots.values() if len(group) > 1])


def tied_names(modules: ModuleMap, path: str) -> list[str]:
    """Paths of all modules whose weight is the same tensor as that of the module at `path`, itself included."""
    weight = modules.modules[path]._parameters.get("weight")
    if weight is None:
        return [path]
    return [name for name, module in modules.modules.items() if module._parameters.get("weight") is weight]


def _may_say_untied(config: Any) -> bool:
    """Whether `tie_word_embeddings=False` changes nothing else when the configuration is read again: T5 would stop scaling
    its decoder's output. There both sides are in the checkpoint all the same, and are loaded apart."""
    said = config.to_dict() | {"tie_word_embeddings": False}
    read = type(config).from_dict(said).to_dict()
    return all(read.get(key) == value for key, value in said.items() if key != "tie_word_embeddings")


def _say_untied(model: nn.Module, paths: set[str]) -> None:
    """Make configuration and class attributes say that these weights are no longer tied."""
    config: Any = getattr(model, "config", None)
    for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else None):
        if part is not None and getattr(part, "tie_word_embeddings", None) and _may_say_untied(part):
            part.tie_word_embeddings = False
    for module in model.modules():
        keys = module.__dict__.get("all_tied_weights_keys")
        if isinstance(keys, dict):
            module.__dict__["all_tied_weights_keys"] = {
                k: v for k, v in keys.items() if not any(p.endswith(k) for p in paths)
            }
