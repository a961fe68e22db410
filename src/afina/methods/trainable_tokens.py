"""Trainable tokens: train single rows of the embedding, for new or domain words, and nothing else of it.

From PEFT's method of this name (https://huggingface.co/docs/peft/package_reference/trainable_tokens). The trained rows
stand in for the embedding's own; where the output head is tied to the embedding, the same rows stand in there too (T6).
Cost: one selection a look-up, one thin product in a tied head; kept for backward: the positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from afina.core.adapter import Adapter, Base, Placement, Weights, cast
from afina.core.config import TargetedConfig, option
from afina.core.registry import register
from afina.core.targets import ModuleMap
from afina.core.ties import tied_names
from afina.errors import Problems, TargetError, did_you_mean

__all__ = ["TrainableTokens", "TrainableTokensConfig"]


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Options of trainable tokens."""

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    beyond_peft: ClassVar[frozenset[str]] = TargetedConfig.beyond_peft | {"exclude_modules", "modules_to_save"}

    token_indices: list[int] = option(None, "ids of the tokens whose rows are trained", factory=list)
    init_weights: bool = option(True, "start from the rows of the base; False: random")

    def check(self, problems: Problems) -> None:
        super().check(problems)
        _check_indices("token_indices", self.token_indices, problems)
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            pass  # PEFT writes the embedding's whole name as a string; it is a pattern that matches itself


def _check_indices(name: str, indices: Any, problems: Problems) -> None:
    indices = list(indices) if isinstance(indices, Iterable) else [indices]
    if not all(isinstance(i, int) and i >= 0 for i in indices):
        problems.add(f"{name}={indices!r}: expected token ids, whole numbers from 0")
    if len(set(indices)) != len(indices):
        problems.add(f"{name} names a token twice")


@register(
    "trainable_tokens",
    config=TrainableTokensConfig,
    trains="chosen rows of the embedding",
    cost="1 selection a look-up; none when merged",
    paper="https://huggingface.co/docs/peft/package_reference/trainable_tokens",
    token_indices=[0, 1],
)
class TrainableTokens(Adapter):
    kinds = frozenset({"embedding", "linear"})

    def build(self, config: Any) -> None:
        view = self.view
        rows, dim = (
            (view.in_features, view.out_features) if view.kind == "embedding" else (view.out_features, view.in_features)
        )
        indices = torch.tensor(list(config.token_indices), dtype=torch.long)
        if bool((indices >= rows).any()):
            raise TargetError(
                f"token ids {[int(i) for i in indices if i >= rows]} are beyond the vocabulary of {rows}; resize the base "
                "first: model.resize_token_embeddings(len(tokenizer))"
            )
        self.register_buffer("indices", indices.to(self.device), persistent=False)
        # row of the table -> row among the trained ones, or -1; what is looked up is kept for backward, hence 32 bits
        place = torch.full((rows,), -1, dtype=torch.int32)
        place[indices] = torch.arange(len(indices), dtype=torch.int32)
        self.register_buffer("place", place.to(self.device), persistent=False)
        self.parameter("trainable_tokens_delta", (len(indices), dim))

    @torch.no_grad()
    def reset(self, config: Any) -> None:
        table = self.view.weight().T if self.view.kind == "embedding" else self.view.weight()
        if config.init_weights:
            self.trainable_tokens_delta.copy_(table[self.indices])
        else:
            self.trainable_tokens_delta.normal_()

    def forward(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        y, rows = base(x), self.trainable_tokens_delta
        if self.view.kind == "embedding":
            place = F.embedding(x, self.place.unsqueeze(1)).squeeze(-1)
            own = self.view.scaled(cast(F.embedding(place.clamp(min=0), rows), y))  # type: ignore[attr-defined]
            return torch.where((place >= 0).unsqueeze(-1), own, y)
        logits = F.linear(x, cast(rows, x), self.bias())
        return y.index_copy(-1, self.indices, logits.to(y.dtype))

    def bias(self) -> torch.Tensor | None:
        """Bias of the trained rows of a head."""
        bias = self.view.bias()
        return None if bias is None else bias[self.indices]

    def values_kept(self, rows: int) -> int:
        return rows * ((self.view.in_features if self.view.kind == "linear" else 4) + 4 * len(self.indices))

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
        dim = 1 if self.view.kind == "embedding" else 0
        rows = self.trainable_tokens_delta.to(weight.dtype)
        return weight.index_copy(dim, self.indices, rows.T if dim else rows), bias

    @classmethod
    def default_targets(cls, modules: ModuleMap) -> list[str]:
        try:
            embedding = modules.model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            raise TargetError(f"{type(modules.model).__name__} has no table of tokens to train rows of") from None
        return [name for name, module in modules.modules.items() if module is embedding]

    @classmethod
    def placements(cls, modules: ModuleMap, config: Any, *, strict: bool) -> list[Placement]:
        plan: list[Placement] = []
        for path in modules.select(config, cls.default_targets, strict=strict):
            if not any(p.path == path for p in plan):
                plan += cls._with_ties(modules, path, cls, config)
        return plan

    @staticmethod
    def _with_ties(modules: ModuleMap, path: str, adapter: type[Adapter], config: Any) -> list[Placement]:
        others = [name for name in tied_names(modules, path) if name != path]
        return [Placement(path, adapter, config=config)] + [
            Placement(other, adapter, config=config, shares=path) for other in others
        ]

    @classmethod
    def companions(cls, modules: ModuleMap, tokens: Any, *, tie: bool, problems: Problems) -> list[Placement]:
        """Trained rows beside another method: a list of ids, or a table of embeddings' names to lists of ids."""
        table: dict[str, list[int]] = {}
        if isinstance(tokens, Mapping):
            for name, indices in tokens.items():
                found, _ = modules._by_suffix([name])
                if not found:
                    problems.add(
                        f"trainable_token_indices entry {name!r} matches no layer.{did_you_mean(name, modules.modules)}"
                    )
                table.update({path: list(indices) for path in found})
        else:
            table = {path: list(tokens) for path in cls.default_targets(modules)}
        plan: list[Placement] = []
        for path, indices in table.items():
            _check_indices("trainable_token_indices", indices, problems)
            named = [other for other in tied_names(modules, path) if other != path and other in table]
            if tie and any(table[other] != indices for other in named):
                problems.add("ensure_weight_tying=True needs the same trainable_token_indices on both sides of the tie")
            if any(p.path == path for p in plan):
                continue
            config = TrainableTokensConfig(token_indices=indices)
            if any(table[other] != indices for other in named):
                plan.append(Placement(path, Companion, config=config))
            else:
                plan += [
                    replace(p, adapter=Companion if p.shares is None else TiedCompanion)
                    for p in cls._with_ties(modules, path, Companion, config)
                ]
        return plan


class Companion(TrainableTokens):
    """Trained rows beside another method; PEFT's files keep them below `token_adapter`."""

    checkpoint_keys: dict[str, str] = {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}


class TiedCompanion(Companion):
    """The other side of a tie, whose rows are stored with the embedding."""

    def stored(self) -> dict[str, torch.Tensor]:
        return {}
