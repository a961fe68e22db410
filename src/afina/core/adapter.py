"""An adapter is advice around a layer.

    forward(x, base) -> y          the activation view: calls base(x) zero or more times
    merge_into(W, b) -> (W', b')   the weight view, for methods that can be merged into the layer

The law: for every mergeable method, every layer kind and every dtype, in eval mode, `forward(x, base)` equals the layer
with `merge_into(W, b)` applied to x. `Delta`, `Scale`, `Rotation` and `Replacement` give one of the two from the other.

dtype, the one rule: parameters are stored in float32 (or float64 for a float64 base), cast to the activation's dtype at
use by `cast`, and the adapted layer gives the result in the dtype of the base's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from afina.core.codecs.written_out import written_out
from afina.core.dropout import drop
from afina.core.layers import LayerView
from afina.errors import MergeError

if TYPE_CHECKING:
    from afina.core.config import AdapterConfig
    from afina.core.targets import ModuleMap

__all__ = [
    "Adapter",
    "Base",
    "Chain",
    "Delta",
    "Placement",
    "Replacement",
    "Rotation",
    "SavedModule",
    "Scale",
    "cast",
    "drop",
]

Weights = tuple[torch.Tensor, torch.Tensor | None]


def cast(parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The parameter in the dtype of an activation."""
    return parameter if parameter.dtype == like.dtype else parameter.to(like.dtype)


class Base:
    """What an adapter is wrapped around: the layer, with the adapters below it when several are stacked."""

    __slots__ = ("adapter", "args", "below", "call", "dtype", "kwargs", "view")

    def __init__(
        self,
        view: LayerView,
        call: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        below: Base | None = None,
        adapter: Adapter | None = None,
    ):
        self.view, self.call, self.args, self.kwargs = view, call, args, kwargs or {}
        self.below, self.adapter = below, adapter
        self.dtype: torch.dtype | None = None  # of the layer's output, once it has been called

    def __call__(self, x: torch.Tensor) -> Any:
        if self.below is not None:
            y = self.adapter.forward(x, self.below)  # type: ignore[union-attr]
            self.dtype = self.below.dtype
            return y
        y = self.call(x, *self.args, **self.kwargs)
        if isinstance(y, torch.Tensor):
            self.dtype = y.dtype
        return y

    def product(self) -> Weights | None:
        """Weight and bias where calling the base is no more than multiplying by them; see `LayerView.product`."""
        return self.view.product() if self.is_layer else None

    @property
    def is_layer(self) -> bool:
        """Whether this is the layer itself, and neither a stack nor a layer whose output is known already."""
        return self.below is None and self.call is self.view.layer

    def weights(self) -> Weights:
        """Canonical weight and bias of the layer with every adapter below merged."""
        if self.below is None:
            return self.view.weight(), self.view.bias()
        return self.adapter.merge_into(*self.below.weights())  # type: ignore[union-attr]


@dataclass
class Placement:
    """One adapter to be put around one layer, or around one bare parameter of a module."""

    path: str
    adapter: type[Adapter]
    parameter: str | None = None
    config: Any = None  # instead of the adapter's whole configuration
    shares: str | None = None  # path of the layer whose adapter's parameters this one uses (tied layers)


class Adapter(nn.Module):
    """Base class of all methods that act on layers.

    A subclass states what it can do in class attributes, builds its parameters in `build`, and gives `forward` and, if
    it can be merged, `merge_into`.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})  # of layers it can adapt
    mergeable: bool = True
    identity_at_init: ClassVar[bool] = True
    checkpoint_keys: dict[str, str] = {}  # parameter name -> name in PEFT's files, where they differ

    def __init__(
        self,
        view: LayerView,
        config: AdapterConfig,
        *,
        device: torch.device | str | None = None,
        initialise: bool = True,
    ):
        super().__init__()
        self.view = view
        self.device = torch.device(device) if device is not None else view.device
        self.dtype = parameter_dtype(view, config)
        self.build(config)
        if initialise and self.device.type != "meta":
            self.reset(config)

    if TYPE_CHECKING:  # parameters are registered by name

        def __getattr__(self, name: str) -> Any: ...

    # --- where it goes

    @classmethod
    def default_targets(cls, modules: ModuleMap) -> list[str]:
        """Names of the layers to adapt where `target_modules` says nothing."""
        linear = modules.roles("query", "value", "fused") or modules.role("linear")
        return linear or (modules.role("conv") if "conv" in cls.kinds else [])

    @classmethod
    def placements(cls, modules: ModuleMap, config: Any, *, strict: bool) -> list[Placement]:
        """Where the adapters of one configuration go."""
        return [Placement(path, cls) for path in modules.select(config, cls.default_targets, strict=strict)]

    # --- to be written by a method

    def build(self, config: Any) -> None:
        """Create the parameters with `self.parameter(name, shape)`; their values are set in `reset`."""
        raise NotImplementedError

    def reset(self, config: Any) -> None:
        """Give the parameters their initial values; not called on the meta device."""

    def forward(self, x: Any, base: Base) -> Any:
        """The activation view."""
        raise NotImplementedError

    def low_rank(self) -> tuple[Any, ...] | None:
        """What `lowrank.LowRank` says of an adapter, from `down` on, where that is all it adds to the layer."""
        return None

    def whole_bias(self) -> torch.Tensor | None:
        """A bias that stands in for the layer's own, where that is all the adapter does."""
        return None

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
        """The weight view: canonical weight and bias to the merged ones, in the dtype they come in."""
        raise MergeError(f"{type(self).__name__} cannot be merged into a layer")

    # --- given

    def parameter(self, name: str, shape: Sequence[int], *, trainable: bool = True) -> None:
        """Register an uninitialised parameter in the adapter's dtype, on the layer's device."""
        empty = torch.empty(*shape, device=self.device, dtype=self.dtype)
        self.register_parameter(name, nn.Parameter(empty, requires_grad=trainable))

    def values_kept(self, rows: int) -> int:
        """Upper bound of the values kept for backward beyond what the layer keeps, for `rows` rows of input and without
        dropout; weights and their copies in another dtype are not counted."""
        return rows * (self.view.in_features + self.view.out_features)

    def share(self, other: Adapter) -> None:
        """Use the parameters of another adapter, whose layer is tied to this one's."""
        for name in self._parameters:
            self._parameters[name] = other._parameters[name]

    def merge_module(self) -> nn.Module | None:
        """A module to stand in for the whole layer when merged; None when `merge_into` says it all."""
        return None

    def stored(self) -> dict[str, torch.Tensor]:
        """What goes into a checkpoint: PEFT's key below the layer's path -> tensor."""
        return {self.checkpoint_keys.get(name, name): p for name, p in self.state_dict(keep_vars=True).items()}


def parameter_dtype(view: LayerView, config: Any) -> torch.dtype:
    """float32 unless the base is float64, or `autocast_adapter_dtype=False` asked for the base's own dtype."""
    if view.dtype == torch.float64 or not getattr(config, "autocast_adapter_dtype", True):
        return view.dtype
    return torch.float32


class Delta(Adapter):
    """y = base(x) + x @ delta.T: give `delta_weight`, and `delta` where there is a cheaper way than the full matrix."""

    def delta_weight(self) -> torch.Tensor:
        """The canonical matrix that merging adds."""
        raise NotImplementedError

    def delta_bias(self) -> torch.Tensor | None:
        """The vector `[out]` that merging adds to the bias."""
        return None

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the output. The matrix is made again in backward rather than kept."""

        def apply(x: torch.Tensor) -> torch.Tensor:
            dtype = x.dtype if x.dtype.is_floating_point else self.view.dtype
            return self.view.apply(x, self.delta_weight().to(dtype))

        return checkpoint(apply, x, use_reentrant=False, preserve_rng_state=False) if self.training else apply(x)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y + delta(x), in y's dtype."""
        return y + self.delta(x).to(y.dtype)

    def forward(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        return self.add_to(base(x), x)

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
        shift = self.delta_bias()
        if shift is not None:
            bias = shift.to(weight.dtype) if bias is None else bias + shift.to(bias.dtype)
        return weight + self.delta_weight().to(weight.dtype).reshape(weight.shape), bias


class Scale(Adapter):
    """y = scale_out * base(scale_in * x) + shift: give any of the three."""

    def scale_in(self) -> torch.Tensor | None:
        """Factors `[in]`, or None."""
        return None

    def scale_out(self) -> torch.Tensor | None:
        """Factors `[out]`, or None; they scale the bias as well."""
        return None

    def shift(self) -> torch.Tensor | None:
        """Summands `[out]`, or None."""
        return None

    def forward(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        if (factor := self.scale_in()) is not None:
            x = x * self.view.per_feature(cast(factor, x), x)
        y = base(x)
        if (factor := self.scale_out()) is not None:
            y = y * self.view.per_feature(cast(factor, y), y)
        if (summand := self.shift()) is not None:
            y = y + self.view.per_feature(cast(summand, y), y)
        return y

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
        if (factor := self.scale_in()) is not None:
            weight = self.view.scale_inputs(weight, factor.to(weight.dtype))
        if (factor := self.scale_out()) is not None:
            weight = weight * factor.to(weight.dtype).unsqueeze(-1)
            bias = None if bias is None else bias * factor.to(bias.dtype)
        if (summand := self.shift()) is not None:
            bias = summand.to(weight.dtype) if bias is None else bias + summand.to(bias.dtype)
        return weight, bias


class Rotation(Adapter):
    """y = base(x R): give `rotate`, which multiplies the last dimension of a tensor by R from the right."""

    kinds = frozenset({"linear"})

    def rotate(self, x: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
        """x R, or x R.T."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        return base(self.rotate(x))

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
        return self.rotate(weight, transposed=True), bias  # (x R) W.T = x (W R.T).T


class Replacement(Adapter):
    """Never calls the base: holds a weight, and a bias where the layer has one, that stand in for the layer's own."""

    kinds = frozenset({"linear", "conv", "embedding", "norm"})

    def build(self, config: Any) -> None:
        self.parameter("weight", self.view.weight_shape)
        bias = self.view.bias()
        if bias is not None:
            self.parameter("bias", bias.shape)

    def reset(self, config: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(self.view.weight())
            if self._parameters.get("bias") is not None:
                self.bias.copy_(self.view.bias())

    def forward(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        held, view = self._parameters, self.view
        weight: Any = held["weight"]
        bias: Any = held.get("bias")
        dtype = x.dtype if view.kind in ("linear", "conv") else view.dtype  # other layers say themselves what they return
        if weight.dtype is not dtype:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return view.apply(x, weight, bias)

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
        own = self._parameters.get("bias")
        return self.weight.detach().to(weight.dtype), None if own is None else own.detach().to(weight.dtype)


class SavedModule(Adapter):
    """A trainable copy that stands in for a whole module: `modules_to_save`, new heads, the last blocks of a model."""

    kinds = frozenset({"linear", "conv", "embedding", "norm", "module"})
    inner: nn.Module

    def build(self, config: Any) -> None:
        self.inner = written_out(copy.deepcopy(self.view.layer), self.dtype)
        for name, p in self.inner.named_parameters():
            p.requires_grad_(p.dtype.is_floating_point)
            if not p.dtype.is_floating_point:
                raise MergeError(f"{name} is stored as {p.dtype}; a quantised module cannot be trained as a whole")
        self.inner.to(dtype=self.dtype)
        empty = self.view.device.type == "meta" and self.device.type != "meta"
        self.inner.to_empty(device=self.device) if empty else self.inner.to(device=self.device)

    def forward(self, x: Any, base: Base) -> Any:
        args = base.args
        if self.view.kind == "embedding":
            base.dtype = self.view.dtype
        if isinstance(x, torch.Tensor) and x.dtype.is_floating_point and x.dtype != self.dtype:
            base.dtype = x.dtype
            if not torch.is_autocast_enabled(x.device.type):
                with torch.autocast(x.device.type, dtype=x.dtype):  # float32 masters, computed in x's dtype
                    return self.inner(x, *args, **base.kwargs)
        return self.inner(x, *args, **base.kwargs)

    def merge_module(self) -> nn.Module:
        merged = copy.deepcopy(self.inner).to(self.view.dtype).requires_grad_(False)
        return merged.train(self.inner.training)

    def share(self, other: Adapter) -> None:
        assert isinstance(other, SavedModule)
        self.inner._parameters["weight"] = other.inner._parameters["weight"]

    def stored(self) -> dict[str, torch.Tensor]:
        return dict(self.inner.state_dict(keep_vars=True))


class Chain(Adapter):
    """Several adapters of one name on one layer, applied in order: LoRA and a trained bias, for example."""

    def __init__(self, links: Sequence[Adapter]):
        nn.Module.__init__(self)
        self.links = nn.ModuleList(links)
        self.view, self.dtype, self.device = links[0].view, links[0].dtype, links[0].device
        self.mergeable = all(link.mergeable for link in links)

    def forward(self, x: Any, base: Base) -> Any:
        for link in self.links[:-1]:
            base = Base(self.view, base, below=base, adapter=link)  # type: ignore[arg-type]
        return self.links[-1].forward(x, base)

    def low_rank(self) -> tuple[Any, ...] | None:
        """Of its one low-rank product, beside which there may be a bias."""
        made, biases = [], 0
        for link in self._held():
            if (found := link.low_rank()) is not None:
                made.append(found)
            elif link.whole_bias() is None:
                return None
            else:
                biases += 1
        return made[0] if len(made) == 1 and biases <= 1 else None

    def whole_bias(self) -> torch.Tensor | None:
        found = [bias for link in self._held() if (bias := link.whole_bias()) is not None]
        return found[0] if len(found) == 1 else None

    def _held(self) -> Iterable[Any]:
        """The links; asked twice a pass, where to go through ModuleList is felt on small layers."""
        return self._modules["links"]._modules.values()  # type: ignore[union-attr]

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
        for link in self.links:
            weight, bias = link.merge_into(weight, bias)  # type: ignore[operator]
        return weight, bias

    def stored(self) -> dict[str, torch.Tensor]:
        return {key: tensor for link in self.links for key, tensor in link.stored().items()}  # type: ignore[operator]
