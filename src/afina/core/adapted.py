"""The wrapper around one layer: the only place that knows which adapters act, in which order, for which rows, how they
are merged and how a merge is undone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from afina.core.adapter import Adapter, Base, Chain, SavedModule
from afina.core.layers import LayerView, ParameterView, view_of
from afina.core.lowrank import LowRank, fused_dtype, low_rank_linear
from afina.core.mixed import forward_together
from afina.core.runtime import Rows, Runtime
from afina.errors import MergeError

__all__ = ["AdaptedLayer"]


class AdaptedLayer(nn.Module):
    """A layer with named adapters around it.

    `base_layer` is the layer itself, called as a module, so that hooks, offloading and quantised kernels keep working.
    Attributes that the wrapper does not have are those of the module that acts: the layer, or the copy trained in its place.
    """

    def __init__(self, base_layer: nn.Module, runtime: Runtime, *, view: LayerView | None = None):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.runtime = runtime
        self.view = view if view is not None else view_of(base_layer)
        self.merged: tuple[str, ...] = ()
        self.chosen: tuple[Any, ...] = ()  # the adapters of `runtime.chosen` that are on this layer
        self.fusable = False  # whether an adapter may be no more than a low-rank product
        self._kept: dict[str, Any] | None = None  # the stored form from before a merge
        self._kept_layer: nn.Module | None = None  # the layer from before a merge that put a module in its place
        self.first = _first_argument(type(base_layer))  # type: ignore[arg-type]
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("adapters", "base_layer"):  # not there yet: while the object is being made or unpickled
                raise
            return getattr(self._acting(), name)

    def _acting(self) -> nn.Module:
        """The module whose attributes are the layer's: a trained copy where one stands in, else the layer."""
        state = self.runtime.state
        for adapter in reversed(self._in_order(state.active) if state.enabled else ()):
            if isinstance(adapter, SavedModule):
                return adapter.inner
        return self._modules["base_layer"]  # type: ignore[return-value]

    # --- adapters

    def add(self, name: str, adapter: Adapter) -> None:
        """Hold one more adapter; a second one of the same name goes on top of the first."""
        if name in self.adapters:
            present = self.adapters[name]
            links = [*present.links] if isinstance(present, Chain) else [present]
            adapter = Chain([*links, adapter])  # type: ignore[list-item]
        adapter.train(self.training)
        self.adapters[name] = adapter
        self.fusable |= type(adapter).low_rank is not Adapter.low_rank

    # --- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.runtime.state
        if not state.enabled:
            return self.base_layer(*args, **kwargs)
        if state.rows is not None:
            return self._forward_rows(state.rows, args, kwargs)
        acting = self._in_order(state.active)
        if not acting:
            return self.base_layer(*args, **kwargs)
        if self.fusable and len(args) == 1 and not kwargs and (y := self._forward_fused(args[0], acting)) is not None:
            return y
        return self._forward_stack(acting, args, kwargs)

    def _forward_fused(self, x: Any, acting: Sequence[Any]) -> torch.Tensor | None:
        """The output in one operation, where the layer and what acts on it are no more than two products."""
        if torch.compiler.is_compiling():  # the compiler fuses by itself
            return None
        own = self.low_rank(acting)
        dtype = None if own is None else fused_dtype(x, own.weight)
        if own is None or dtype is None:
            return None
        return low_rank_linear(x, own, dtype)

    def low_rank(self, acting: Sequence[Any]) -> LowRank | None:
        """The layer and the adapters that act on it, where these are no more than a product and a low-rank product."""
        view = self.view
        if len(acting) != 1 or (beside := acting[0].low_rank()) is None or self._modules["base_layer"] is not view.layer:
            return None
        product = view.product()
        if product is None:
            return None
        trained = acting[0].whole_bias()
        return LowRank(product[0], product[1] if trained is None else trained, *beside)

    def choose(self, names: Sequence[str]) -> None:
        """Have the adapters of these names in `chosen`."""
        self.chosen = tuple(self.adapters[name] for name in names if name in self.adapters)

    def _in_order(self, active: tuple[str, ...]) -> Sequence[Any]:
        """The adapters that act, in their order. Where they are those chosen they need not be looked up by their names, so
        that compiled code fits all of one kind and size, and switching compiles nothing again."""
        if self.runtime.by_choice and not self.merged:
            return self.chosen
        held: Any = self._modules["adapters"]._modules  # type: ignore[union-attr]
        return [held[name] for name in active if name in held and name not in self.merged]

    def _forward_stack(self, acting: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        view = self.view
        x, base = self._split(args, kwargs)
        top, *above = acting
        for adapter in above:
            base = Base(view, base, below=base, adapter=top)
            top = adapter
        if isinstance(view, ParameterView):
            weight, _ = top.merge_into(*base.weights())
            return view.call(weight, args, kwargs)
        y = top.forward(x, base)
        dtype = base.dtype
        return y if dtype is None or not isinstance(y, torch.Tensor) or y.dtype is dtype else y.to(dtype)

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Base]:
        """The input, and the layer as a function of it; some models pass the input by name."""
        if not args and self.first in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop(self.first),)
        layer: Any = self._modules["base_layer"]
        return (args[0] if args else None), Base(self.view, layer, args[1:], kwargs)

    def _forward_rows(self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A batch whose rows use different adapters: all at once where they allow it, else one adapter after the other."""
        held: Any = self.adapters._modules
        if not any(name in held for name in rows.distinct):
            return self.base_layer(*args, **kwargs)
        x, whole = self._split(args, kwargs)
        size = x.shape[0]
        if size % len(rows.names):
            raise MergeError(
                f"adapter_names names {len(rows.names)} rows, but a {type(self.base_layer).__name__} was given a leading "
                f"dimension of {size}: this layer does not see whole rows, so a mixed batch is not possible"
            )
        y = forward_together(held, rows, x, whole)
        if y is not None:
            return y if whole.dtype is None or y.dtype == whole.dtype else y.to(whole.dtype)
        y = whole(x)
        parts = []
        for name in rows.distinct:
            index = rows.index(name, size, x.device)
            part = _take(y, index, size)
            if name in held:
                some_args, some_kwargs = _take((whole.args, whole.kwargs), index, size)
                some_x = x[index]
                base = Base(self.view, _Known(some_x, part, self.base_layer), some_args, some_kwargs)
                part = held[name].forward(some_x, base)
            parts.append(part)
        return _put(y, parts, None if rows.sorted else rows.back(size, x.device), size)

    # --- merging

    def merge(self, names: Sequence[str], *, keep: bool = True) -> None:
        """Put adapters into the stored weight, in order. `keep` holds on to what was stored, for `unmerge`."""
        names = [name for name in names if name in self.adapters and name not in self.merged]
        if not names:
            return
        if self.merged and self._kept is not None:  # start again from what was stored, so that order is all that counts
            names = [*self.merged, *names]
            self.unmerge()
        adapters: list[Any] = [self.adapters[name] for name in names]
        if stuck := [name for name, adapter in zip(names, adapters, strict=True) if not adapter.mergeable]:
            raise MergeError(f"{', '.join(stuck)} ({type(adapters[0]).__name__}) cannot be merged into a layer")
        if keep and self._kept is None:
            self._kept, self._kept_layer = self.view.keep(), self.base_layer
        whole = [adapter.merge_module() for adapter in adapters]
        if any(module is not None for module in whole):
            last = max(i for i, module in enumerate(whole) if module is not None)
            self.base_layer = whole[last]  # type: ignore[assignment]
            self.view = view_of(self.base_layer)
            adapters = adapters[last + 1 :]
        if adapters:
            with torch.no_grad():
                weight, bias = self.view.weight(), self.view.bias()
                dtype = torch.promote_types(weight.dtype, torch.float32)
                weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
                for adapter in adapters:
                    weight, bias = adapter.merge_into(weight, bias)
                if not bool(torch.isfinite(weight).all()):
                    raise MergeError(f"merging {', '.join(names)} gives values that are not finite")
                self.view.write(weight, bias)
        self.merged += tuple(names)

    def unmerge(self) -> None:
        """Put back the stored bits from before `merge`."""
        if not self.merged:
            return
        if self._kept is None or self._kept_layer is None:
            raise MergeError("this layer was merged without keeping its weight; load the base model again")
        if self.base_layer is not self._kept_layer:
            self.base_layer = self._kept_layer
            self.view = next(iter(self.adapters.values())).view  # type: ignore[assignment]
        else:
            self.view.restore(self._kept)
        self._kept = self._kept_layer = None
        self.merged = ()


@functools.cache
def _first_argument(layer: type[nn.Module]) -> str:
    """Name of the input of a layer's forward."""
    return next(iter([*inspect.signature(layer.forward).parameters][1:]), "")


class _Known:
    """The layer, whose output for one `x` is known already."""

    def __init__(self, x: Any, y: Any, layer: nn.Module):
        self.x, self.y, self.layer = x, y, layer

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.y if x is self.x else self.layer(x, *args, **kwargs)


def _take(value: Any, index: torch.Tensor | slice, size: int) -> Any:
    """The rows `index` of every tensor whose leading dimension is the batch."""
    if isinstance(value, torch.Tensor):
        return value[index] if value.dim() and value.shape[0] == size else value
    if isinstance(value, tuple | list):
        return type(value)(_take(v, index, size) for v in value)
    if isinstance(value, dict):
        return {k: _take(v, index, size) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise MergeError(
        f"a mixed batch cannot divide a {type(value).__name__} among its rows; pass use_cache=False or adapters that act "
        "on single layers"
    )


def _put(y: Any, parts: list[Any], back: torch.Tensor | None, size: int) -> Any:
    """The outputs of all adapters as one, in the form of the layer's, the rows moved to the places `back`. Heads of
    different sizes are filled up with zeros."""
    if y is None:
        return None
    if not isinstance(y, torch.Tensor):
        return type(y)(_put(v, [part[i] for part in parts], back, size) for i, v in enumerate(y))
    if not y.dim() or len(y) != size:
        raise MergeError(f"a mixed batch cannot put together an output of shape {[*y.shape]} for {size} rows")
    widest = max(part.shape[-1] for part in parts) if y.dim() > 1 else 0
    parts = [_widened(part, widest) if y.dim() > 1 and part.shape[-1] < widest else part for part in parts]
    made = torch.cat([part.to(y.dtype) for part in parts])
    return made if back is None else made[back]


def _widened(y: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(y, (0, width - y.shape[-1]))
