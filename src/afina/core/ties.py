"""Weights that several modules share (T6).

A tie is one Parameter object under several names. A merge puts new Parameters in place, so it never changes the other
side by accident; afterwards sides that came out equal are tied again, and where they differ the model's configuration
is made to say so, or saving and loading would tie them back together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from afina.core.targets import ModuleMap

__all__ = ["tied_groups", "tied_names"]


class Ties:
    """Which parameter slots shared one tensor."""

    def __init__(self, groups: list[list[tuple[nn.Module, str, str]]]):
        self.groups = groups

    def mend(self, model: nn.Module, *, untie: bool) -> None:
        """Tie again what came out equal; with `untie`, write down what did not."""
        for group in self.groups:
            first = group[0][0]._parameters[group[0][1]]
            assert first is not None
            same = all(
                m._parameters[n] is first or torch.equal(m._parameters[n], first)  # type: ignore[arg-type]
                for m, n, _ in group[1:]
            )
            if same:
                for module, name, _ in group[1:]:
                    module._parameters[name] = first
            elif untie:
                _say_untied(model, {path for _, _, path in group})


def tied_groups(model: nn.Module) -> Ties:
    """The ties of a model as it stands, by tensor identity."""
    slots: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if ".adapters." in f".{path}.":
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                group = slots.setdefault(id(parameter), [])
                if not any(m is module and n == name for m, n, _ in group):
                    group.append((module, name, f"{path.replace('.base_layer', '')}.{name}"))
    return Ties([group for group in slots.values() if len(group) > 1])


def tied_names(modules: ModuleMap, path: str) -> list[str]:
    """Paths of all modules whose weight is the same tensor as that of the module at `path`, itself included."""
    weight = modules.modules[path]._parameters.get("weight")
    if weight is None:
        return [path]
    return [name for name, module in modules.modules.items() if module._parameters.get("weight") is weight]


def _say_untied(model: nn.Module, paths: set[str]) -> None:
    """Make configuration and class attributes say that these weights are no longer tied."""
    config: Any = getattr(model, "config", None)
    for part in (config, config.get_text_config() if hasattr(config, "get_text_config") else None):
        if part is not None and getattr(part, "tie_word_embeddings", None):
            part.tie_word_embeddings = False
    for module in model.modules():
        keys = module.__dict__.get("all_tied_weights_keys")
        if isinstance(keys, dict):
            module.__dict__["all_tied_weights_keys"] = {
                k: v for k, v in keys.items() if not any(p.endswith(k) for p in paths)
            }
