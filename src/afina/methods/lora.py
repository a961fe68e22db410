"""LoRA: a low-rank matrix beside the frozen weight. y = base(x) + (alpha / r) B A x.

Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised scaling alpha / sqrt(r): Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732. Cost: two thin products a layer; kept for backward: x and the r values of A x.

Convolutions: A is a convolution to r channels with the layer's own kernel, stride, padding and dilation, B a pointwise
one. For grouped convolutions each group has r channels of its own, so that the product is again a grouped convolution
and can be merged (PEFT mixes the groups in A there and cannot merge; such files are not interchangeable).
Stacks of matrices (fused experts): one pair of factors a matrix, stored as PEFT does, A expert by expert, B with the
expert as the fastest index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from afina.core.adapter import Adapter, Base, Delta, Placement, cast, drop
from afina.core.config import TargetedConfig, option
from afina.core.layers import view_of
from afina.core.lowrank import LowRank, fused_dtype, low_rank_linear
from afina.core.mixed import Factored, Factors
from afina.core.registry import register
from afina.core.targets import ModuleMap, matches_any
from afina.core.ties import tied_names
from afina.errors import ConfigError, Problems, TargetError, did_you_mean
from afina.methods.bitfit import Bias

__all__ = ["LoRA", "LoraConfig"]

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga")  # initialisations of PEFT
_ONLY_READ = ("eva", "orthogonal")


@dataclass
class LoraConfig(TargetedConfig):
    """Options of LoRA and the methods built on its factors."""

    peft_type: ClassVar[str] = "LORA"
    overrides: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    beyond_peft: ClassVar[frozenset[str]] = frozenset()
    foreign: ClassVar[Mapping[str, Any]] = {
        "alora_invocation_tokens": None, "arrow_config": None, "corda_config": None, "eva_config": None,
        "kasa_config": None, "layer_replication": None, "lora_ga_config": None,
        "megatron_config": None, "megatron_core": "megatron.core", "monteclora_config": None, "qalora_group_size": 16,
        "runtime_config": None, "use_bdlora": None, "use_qalora": False, "velora_config": None,
    }  # fmt: skip

    r: int = option(8, "rank", low=1)
    lora_alpha: float = option(8, "strength: the product is scaled by lora_alpha / r")
    lora_dropout: float = option(0.0, "dropout on the input of A", low=0.0, high=1.0)
    fan_in_fan_out: bool = option(False, "in PEFT's files; afina sees for itself how a layer stores its weight")
    bias: str = option("none", "train biases as well", choices=("none", "all", "lora_only"))
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead")
    init_lora_weights: Any = option(
        True, "True or 'gaussian': start as the base; 'loftq': closer to the base before it was quantised; False: random"
    )
    loftq_config: Any = option(None, "with 'loftq': {loftq_bits: bits of the base}, checked against it", factory=dict)
    rank_pattern: dict[str, int] = option(None, "rank of the modules that a pattern names", factory=dict)
    alpha_pattern: dict[str, float] = option(None, "lora_alpha of the modules that a pattern names", factory=dict)
    use_dora: bool = option(False, "train direction and magnitude apart (DoRA)")
    lora_bias: bool = option(False, "a trained bias on B")
    target_parameters: Any = option(None, "bare parameters to adapt, such as the fused experts of a mixture")

    def check(self, problems: Problems) -> None:
        super().check(problems)
        init = self.init_lora_weights
        if str(init).startswith(_CHANGE_THE_BASE):
            problems.add(
                f"init_lora_weights={init!r} changed the base it was trained on, so its file alone does not fit the base; "
                "convert it in PEFT with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        elif init not in (True, False, "gaussian", "loftq", *_ONLY_READ):
            problems.add(f"init_lora_weights={init!r}: expected True, False, 'gaussian' or 'loftq'")
        self._check_loftq(problems)
        if self.lora_bias and self.use_dora:
            problems.add("lora_bias=True and use_dora=True exclude each other: DoRA rescales what the bias is added to")
        if self.target_parameters:
            for name in ("lora_dropout", "use_dora", "lora_bias"):
                if getattr(self, name):
                    problems.add(f"{name}={getattr(self, name)!r} is not possible with target_parameters")

    def _check_loftq(self, problems: Problems) -> None:
        asked = self.loftq_config or {}
        asked = dict(asked) if isinstance(asked, Mapping) else vars(asked)  # PEFT's LoftQConfig
        self.loftq_config = asked
        if asked and self.init_lora_weights != "loftq":
            problems.add("loftq_config says nothing without init_lora_weights='loftq'")
        for key in asked.keys() - {"loftq_bits", "loftq_iter"}:
            problems.add(f"loftq_config: {key!r} is not known.{did_you_mean(key, ['loftq_bits', 'loftq_iter'])}")
        if (times := asked.get("loftq_iter", 1)) != 1:
            problems.add(
                f"loftq_iter={times}: every further step quantises the base anew, so that the adapter that is saved would "
                "not fit the base as it is loaded; for that base one step is the best there is. Leave it out"
            )
        if self.init_lora_weights == "loftq" and self.use_dora:
            problems.add("init_lora_weights='loftq' is not done with use_dora=True")

    def to_dict(self) -> dict[str, Any]:
        """What is written: an adapter that began by LoftQ applies to the base as it is, so nothing is to be said of it."""
        written = super().to_dict()
        return written | ({"init_lora_weights": True, "loftq_config": {}} if self.init_lora_weights == "loftq" else {})

    def check_file(self, source: str) -> None:
        """Raise ConfigError where a file that another tool wrote belongs to a base that was changed for it."""
        if self.init_lora_weights == "loftq":
            raise ConfigError(
                f"{source}: init_lora_weights='loftq' of PEFT changed the base it was trained on, so its file alone does "
                "not fit the base; merge it in PEFT"
            )

    @property
    def scaling(self) -> float:
        """Factor of the product B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@register(
    "lora",
    config=LoraConfig,
    trains="a low-rank matrix beside each weight",
    cost="2 thin products a layer; none when merged",
    paper="https://arxiv.org/abs/2106.09685",
)
class LoRA(Factored, Delta):
    kinds = frozenset({"linear", "conv", "embedding", "parameter"})
    checkpoint_keys: dict[str, str] = {
        "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias",
    }  # fmt: skip

    def build(self, config: LoraConfig) -> None:
        self.r, self.scaling, self.p = config.r, config.scaling, config.lora_dropout
        view, r = self.view, config.r
        self.matrices = math.prod(view.weight_shape[:-2]) if view.kind == "parameter" else 1
        if view.kind == "embedding":
            self.checkpoint_keys = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        out, n_in = view.out_features, view.in_features
        self.parameter("lora_A", self._conv((r, n_in), kernel=True) if view.kind == "conv" else (r * self.matrices, n_in))
        self.parameter("lora_B", self._conv((out, r)) if view.kind == "conv" else (out, r * self.matrices))
        if config.lora_bias:
            self.parameter("lora_bias", (out,))
            if view.bias() is None:
                raise TargetError("lora_bias=True needs layers with a bias of their own, or it could not be merged")

    def _conv(self, shape: tuple[int, int], *, kernel: bool = False) -> tuple[int, ...]:
        conv: Any = self.view.layer
        if kernel:
            return (shape[0], shape[1] // conv.groups, *conv.kernel_size)
        return (*shape, *[1] * len(conv.kernel_size))

    @torch.no_grad()
    def reset(self, config: LoraConfig) -> None:
        if config.init_lora_weights in _ONLY_READ:
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r}: afina reads adapters that began so, but begins with True, "
                "False or 'gaussian'"
            )
        zero, random = (self.lora_A, self.lora_B) if self.view.kind == "embedding" else (self.lora_B, self.lora_A)
        if self.view.kind == "embedding":
            random.normal_()
        elif config.init_lora_weights == "gaussian":
            random.normal_(std=1 / config.r)
        else:
            random.uniform_(-1, 1).mul_(1 / math.sqrt(math.prod(random.shape[1:])))
        if config.init_lora_weights is False:
            zero.uniform_(-1, 1).mul_(1 / math.sqrt(math.prod(zero.shape[1:])))
        else:
            zero.zero_()
        if config.lora_bias:
            self.lora_bias.zero_()

    @torch.no_grad()
    def approximate(self, change: torch.Tensor) -> None:
        """Make the product that is added the closest of its rank to `change` `[out, in]` (linear layers)."""
        u, s, v = torch.linalg.svd(change.float() / self.scaling, full_matrices=False)
        root, r = s[: self.r].sqrt(), len(s[: self.r])
        self.lora_A.zero_()
        self.lora_B.zero_()
        self.lora_A[:r] = (root[:, None] * v[:r]).to(self.lora_A.dtype)
        self.lora_B[:, :r] = (u[:, :r] * root).to(self.lora_B.dtype)

    def delta_weight(self) -> torch.Tensor:
        if self.view.kind != "parameter" or len(self.view.weight_shape) == 2:
            return self.lora_B.flatten(1) @ self.lora_A.flatten(1) * self.scaling
        down = self.lora_A.reshape(self.matrices, self.r, -1)
        up = self.lora_B.reshape(-1, self.r, self.matrices)
        delta = torch.einsum("ore,eri->eoi", up, down) * self.scaling
        return delta.reshape(self.view.weight_shape)

    def delta_bias(self) -> torch.Tensor | None:
        bias = self._parameters.get("lora_bias")
        return None if bias is None else bias * self.scaling

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        view = self.view
        if view.kind == "embedding":
            return view.scaled(F.embedding(x, self.lora_A.T) @ self._scaled_up().T)  # type: ignore[attr-defined]
        z = view.project(drop(x, self.p, self.training), cast(self.lora_A, x))
        y = view.expand(z, cast(self._scaled_up(), x))
        shift = self.delta_bias()
        return y if shift is None else y + view.per_feature(cast(shift, x), y)

    def _scaled_up(self) -> torch.Tensor:
        """B with the scale in it: to multiply the few values of B is less than to multiply an output."""
        return self.lora_B if self.scaling == 1.0 else self.lora_B * self.scaling

    def forward(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        if torch.compiler.is_compiling():  # the compiler fuses by itself
            return self.add_to(base(x), x)
        product, low_rank = base.product(), self.low_rank()
        dtype = fused_dtype(x, product[0]) if product is not None and low_rank is not None else None
        if dtype is None:
            return self.add_to(base(x), x)
        base.dtype = dtype
        return low_rank_linear(x, LowRank(*product, *low_rank), dtype)  # type: ignore[misc]

    def low_rank(self) -> tuple[Any, ...] | None:
        if not self._is_product:
            return None
        own = self._parameters
        return own["lora_A"], own["lora_B"], own.get("lora_bias"), self.scaling, self.p if self.training else 0.0

    def factors(self) -> Factors | None:
        found = self.low_rank()
        return None if found is None or found[2] is not None else Factors(found[0], found[1], *found[3:])

    @cached_property
    def _is_product(self) -> bool:
        """Whether what is added is B A x, and a bias, to a linear layer; not so for a subclass that changes it."""
        same = ("forward", "delta", "delta_weight", "delta_bias", "add_to")
        return self.view.kind == "linear" and all(getattr(type(self), name) is getattr(LoRA, name) for name in same)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.view.kind != "linear" or y.dtype != x.dtype or y.dim() < 2 or "lora_bias" in self._parameters:
            return super().add_to(y, x)
        z = F.linear(drop(x, self.p, self.training), cast(self.lora_A, x))
        up = cast(self.lora_B, x)  # y + scaling * z @ B.T in one call
        return torch.addmm(y.flatten(0, -2), z.flatten(0, -2), up.T, alpha=self.scaling).view(y.shape)

    def values_kept(self, rows: int) -> int:
        return rows * (self.view.in_features + self.r)

    @classmethod
    def placements(cls, modules: ModuleMap, config: Any, *, strict: bool) -> list[Placement]:
        parameters = cls._bare_parameters(modules, config, strict=strict)
        if parameters and config.target_modules is None:
            paths: list[str] = []
        else:
            paths = modules.select(config, cls.default_targets, strict=strict)
        plan = cls._tied(modules, paths) if config.ensure_weight_tying else [Placement(path, cls) for path in paths]
        for path, name in parameters:
            plan.append(Placement(path, cls, parameter=name, config=config.for_module(f"{path}.{name}")))
        if config.bias != "none":
            plan += [Placement(path, WrappedBias) for path in paths if WrappedBias.fits(modules, path)]
        if config.bias == "all":
            plan += [p for p in Bias.everywhere(modules, config) if p.path not in set(paths)]
        return plan

    @classmethod
    def _tied(cls, modules: ModuleMap, paths: list[str]) -> list[Placement]:
        """Both sides of every tie, the embedding first: its factors serve the others too."""
        plan: list[Placement] = []
        for path in paths:
            names = tied_names(modules, path)
            if any(p.path == path for p in plan):
                continue
            tables = [n for n in names if view_of(modules.modules[n]).kind == "embedding"] or [path]
            if cls is not LoRA and set(names) - set(tables) and len(names) > 1:
                raise TargetError(
                    f"ensure_weight_tying=True with use_dora=True: {' and '.join(names)} are tied, and a magnitude for each "
                    "output of the one is none for the other; use LoRA there, or target one side"
                )
            plan.append(Placement(tables[0], cls))
            plan += [Placement(n, cls if n in tables else TiedLoRA, shares=tables[0]) for n in names if n != tables[0]]
        return plan

    @staticmethod
    def _bare_parameters(modules: ModuleMap, config: Any, *, strict: bool) -> list[tuple[str, str]]:
        wanted, problems = config.target_parameters or [], Problems("LoraConfig")
        found: list[tuple[str, str]] = []
        names = {}
        for path, module in modules.modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() >= 2:
                    names[f"{path}.{name}"] = (path, name)
        hit = {full: place for full, place in names.items() if matches_any(list(wanted), full)}
        for entry in wanted:
            if strict and not any(matches_any([entry], full) for full in hit):
                problems.add(f"target_parameters entry {entry!r} matches no parameter.{did_you_mean(entry, names)}")
        problems.raise_as(TargetError)
        found.extend(hit.values())
        return found


class TiedLoRA(LoRA):
    """The head's side of a tie: the factors of the embedding, transposed, so that both sides change by one matrix."""

    def build(self, config: LoraConfig) -> None:
        self.p = config.lora_dropout

    def reset(self, config: LoraConfig) -> None:
        pass

    def share(self, other: Adapter) -> None:
        assert isinstance(other, LoRA)
        self.r, self.scaling, self.matrices = other.r, other.scaling, 1
        self.table = (other,)  # in a tuple, since the embedding owns the parameters

    @property
    def lora_A(self) -> torch.Tensor:  # noqa: N802
        return self.table[0].lora_B.T

    @property
    def lora_B(self) -> torch.Tensor:  # noqa: N802
        return self.table[0].lora_A.T

    def delta_weight(self) -> torch.Tensor:
        return self.table[0].delta_weight().T

    def stored(self) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


class WrappedBias(Bias):
    """The bias of a layer that has a LoRA as well; PEFT's files name it below `base_layer`."""

    checkpoint_keys: dict[str, str] = {"bias": "base_layer.bias"}
