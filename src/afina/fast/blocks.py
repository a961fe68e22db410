"""The blocks of a transformer, and from which of them on something is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from afina.core.adapted import AdaptedLayer

__all__ = ["Stack", "find_stack"]


@dataclass(frozen=True)
class Stack:
    """The blocks that run one after the other; `owner` is the module that is given the tokens.

    `depth` counts the first blocks in and before which nothing is trained; `before` are the modules that run before the
    first block, and `around` those that hold the blocks.
    """

    owner: nn.Module
    name: str
    blocks: nn.ModuleList
    depth: int
    before: tuple[nn.Module, ...] = ()
    around: tuple[nn.Module, ...] = ()

    def places(self, model: nn.Module) -> tuple[Any, ...]:
        """The paths of its modules in `model`, for `at`."""
        path = {module: name for name, module in model.named_modules()}
        parts = tuple(tuple(path[module] for module in modules) for modules in (self.before, self.around))
        return path[self.owner], self.name, path[self.blocks], self.depth, *parts

    @classmethod
    def at(cls, model: nn.Module, places: tuple[Any, ...]) -> Stack:
        """The stack in a model that is built alike."""
        owner, name, blocks, depth, *parts = places
        before, around = (tuple(model.get_submodule(path) for path in paths) for paths in parts)
        found: Any = model.get_submodule(blocks)
        return cls(model.get_submodule(owner), name, found, depth, before, around)


def find_stack(model: Any, call: Callable[[], Any]) -> Stack | str:
    """The longest list of blocks of a model of transformers, adapted or not, or why there is none to be used.

    `call` runs the model once on a small batch, without gradients: the order in which modules are called is watched.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    owner = base.get_encoder() if getattr(base.config, "is_encoder_decoder", False) else base
    lists = [(name, m) for name, m in owner.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    lists = [(name, m) for name, m in lists if len({_kind(block) for block in m}) == 1]
    weights = [(sum(p.numel() for p in m.parameters()), name, m) for name, m in lists]
    if not weights or not max(weights)[0]:
        return f"{type(base).__name__} has no list of blocks"
    _, name, blocks = max(weights, key=lambda found: found[0])
    order = _order(model, owner, name, blocks, call)
    if not isinstance(order, dict):
        return order
    trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    depth = trained.index(True) if any(trained) else len(blocks)
    entered = order[blocks[depth]] if depth < len(blocks) else order[blocks[-1]]
    around = tuple(m for m in model.modules() if any(part is blocks for part in m.modules()) and m is not blocks)
    early = [m for m, n in order.items() if n < order[blocks[0]] and m not in around]
    before = tuple(m for m in early if owner is base or any(m is part for part in owner.modules()))
    inside = {id(p) for p in blocks.parameters()}
    for path, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and p.requires_grad and id(p) not in inside]
        if own and (called := _called(model, path, blocks, order)) is None:
            return f"{path or 'the model itself'} is trained and acts on all blocks"
        if own and called is not None and called < entered:
            depth = 0  # what enters the first block changes
    return Stack(owner, name, blocks, depth, before, around)


def _kind(block: nn.Module) -> type:
    return type(block.base_layer) if isinstance(block, AdaptedLayer) else type(block)


def _order(model: Any, owner: nn.Module, name: str, blocks: nn.ModuleList, call: Callable[[], Any]) -> dict[Any, int] | str:
    order: dict[Any, int] = {}
    counts: dict[Any, int] = {}

    def note(module: nn.Module, *_: Any) -> None:
        order.setdefault(module, len(order))
        counts[module] = counts.get(module, 0) + 1

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    if [order.get(block) for block in blocks] != sorted(order.get(block, -1) for block in blocks):
        return f"the blocks of {name} do not run one after the other"
    if any(counts.get(block) != counts.get(owner) for block in blocks) or blocks[0] not in order:
        return f"the blocks of {name} do not run once each"
    return order


def _called(model: Any, path: str, blocks: nn.ModuleList, order: dict[Any, int]) -> int | None:
    """When the nearest module around `path` ran that does not hold the blocks; None where there is none."""
    while path:
        module = model.get_submodule(path)
        if blocks is module or any(m is blocks for m in module.modules()):
            return None
        if module in order:
            return order[module]
        path = path.rpartition(".")[0]
    return None
