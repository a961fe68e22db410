"""Last layers: train the last n blocks, the final norm and the head as they are, and freeze everything below.

The recipe of chapter 6 of Raschka's "Build a Large Language Model (From Scratch)", 2024
(https://www.manning.com/books/build-a-large-language-model-from-scratch), for the GPT-2 spam classifier. The trained
modules are copies that stand in for the base's own, so that the base stays as it was. Cost: backward reaches only the
last blocks; memory: a float32 copy of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from afina.core.adapter import Placement, SavedModule
from afina.core.config import TargetedConfig, option
from afina.core.registry import register
from afina.core.targets import ModuleMap
from afina.errors import ConfigError

__all__ = ["LastLayers", "LastLayersConfig"]


@dataclass
class LastLayersConfig(TargetedConfig):
    """Options of last-layers tuning."""

    peft_type: ClassVar[str] = "LAST_LAYERS"

    num_layers: int = option(1, "how many of the last blocks to train; 0 for the final norm and the head alone", low=0)
    final_norm: bool = option(True, "train the norm after the last block")
    head: bool = option(True, "train the output head")


@register(
    "last_layers",
    config=LastLayersConfig,
    trains="the last blocks, the final norm and the head",
    cost="none; backward stops below the trained blocks",
    paper="https://www.manning.com/books/build-a-large-language-model-from-scratch",
)
class LastLayers(SavedModule):
    @classmethod
    def placements(cls, modules: ModuleMap, config: Any, *, strict: bool) -> list[Placement]:
        if config.target_modules is not None:
            paths = modules.select(config, lambda m: [], strict=strict)
        else:
            paths = cls.last(modules, config)
        saved = tuple(config.modules_to_save or ())
        return [Placement(p, cls) for p in paths if p not in saved and not p.startswith(tuple(f"{s}." for s in saved))]

    @staticmethod
    def last(modules: ModuleMap, config: LastLayersConfig) -> list[str]:
        """The last blocks of the last stack, the norms after it, and the head."""
        if not modules.blocks:
            raise ConfigError("last_layers found no list of blocks in this model; name the modules with target_modules")
        stack = modules.blocks[-1]
        if config.num_layers > len(stack):
            raise ConfigError(f"num_layers={config.num_layers}, but the model has {len(stack)} blocks")
        paths = stack[len(stack) - config.num_layers :]
        order = list(modules.modules)
        end = max(i for i, name in enumerate(order) if name == stack[-1] or name.startswith(f"{stack[-1]}."))
        if config.final_norm:
            norms = set(modules.role("norm"))
            paths += [name for name in order[end + 1 :] if name in norms]
        if config.head:
            heads = [name for name in modules.head_names() if name in set(order[end + 1 :])]
            paths += [n for n in order if n in heads and not any(n.startswith(f"{h}.") for h in heads)]
        return paths
