"""A layer for a batch whose rows use different adapters: what they do is done for all rows at once, where it is a low-rank
product or a scale.

The layer itself is computed once. Rows are not moved: `Rows` divides the batch into units of equally many rows of one
adapter each, the factors are laid side by side, one pair a unit, and two batched products do for all adapters what two
products do for one (grouped products, as Chen et al. 2023, https://arxiv.org/abs/2310.18547, and Sheng et al. 2023,
https://arxiv.org/abs/2311.03285, do in kernels of their own). Smaller ranks are filled up with zeros; rows without an
adapter have factors of zeros. What it costs beside one adapter is the laying.

In training the layer and all products are one node of the graph, as in `lowrank.py`. Kept for backward: x, what is between
the factors, one copy of these, and one byte a value of x under dropout.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from afina.core.adapter import Base, Scale
from afina.core.dropout import drop, keep_mask
from afina.core.lowrank import fused_dtype, would_cast
from afina.core.runtime import Rows

__all__ = ["Factored", "Factors", "forward_together", "told"]

Optional = torch.Tensor | None


class Factors(NamedTuple):
    """What is added to a layer's output: scale (drop(x) down.T) up.T, down `[r, in]`, up `[out, r]`, p of dropout."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    p: float


class Factored:
    """A kind of adapter that may be no more than a product of two factors."""

    def factors(self) -> Factors | None:
        """The product, where it is all that this adapter adds to a linear layer."""
        raise NotImplementedError


def forward_together(adapters: Mapping[str, Any], rows: Rows, x: Any, base: Base) -> torch.Tensor | None:
    """The layer's output, each row with its adapter; None where adapters have to go one by one."""
    if not isinstance(x, torch.Tensor) or x.dim() < 2:
        return None
    if rows.kept is not None and not torch.is_grad_enabled():
        product = base.product()
        dtype = None if product is None else fused_dtype(x, product[0])
        pair = rows.kept.get((id(base.view), dtype))
        if product is not None and pair is not None:
            base.dtype = dtype
            return _multiplied(x.to(dtype), *product, *pair)[0]
    held = [adapters.get(name) for name in rows.distinct]
    if _all_scale(held):
        return _scaled(held, rows, x, base)
    factors = _all_factors(held)
    return None if factors is None else _added(factors, rows, x, base)


def told(layers: Mapping[str, Any], names: Sequence[str]) -> str:
    """How a batch of these adapters goes through the adapted layers of a model, as a sentence (T35)."""
    together, apart = 0, dict[str, int]()
    for layer in layers.values():
        held = [layer.adapters._modules.get(name) for name in dict.fromkeys(names)]
        kinds = " and ".join(dict.fromkeys(type(adapter).__name__ for adapter in held if adapter is not None))
        if kinds and (_all_scale(held) or _all_factors(held) is not None):
            together += 1
        elif kinds:
            apart[kinds] = apart.get(kinds, 0) + 1
    parts = [f"{together} layers compute all adapters at once"] * bool(together)
    parts += [f"{count} one adapter after the other ({kinds})" for kinds, count in apart.items()]
    return f"rows of different adapters: {', '.join(parts) or 'none of them acts on a layer'}"


def _all_scale(held: Sequence[Any]) -> bool:
    return all(a is None or (isinstance(a, Scale) and type(a).forward is Scale.forward) for a in held)


def _all_factors(held: Sequence[Any]) -> list[Factors | None] | None:
    """The products of adapters (None for rows without one), where all are no more than that."""
    found: list[Factors | None] = []
    for adapter in held:
        factors = adapter.factors() if isinstance(adapter, Factored) else None
        if factors is None and adapter is not None:
            return None
        found.append(factors)
    return found


# --- scales


def _scaled(held: Sequence[Any], rows: Rows, x: torch.Tensor, base: Base) -> torch.Tensor:
    """What `Scale.forward` does, with the vectors of each row's adapter."""

    def vectors(given: list[Optional], like: torch.Tensor, empty: float) -> Optional:
        """`[rows, ...]`, shaped to go with `like`; None where no adapter has any."""
        known = next((v for v in given if v is not None), None)
        if known is None:
            return None
        all_of_them = torch.stack([torch.full_like(known, empty) if v is None else v for v in given])
        each = all_of_them.to(like.dtype)[rows.adapter_of(len(like), like.device)]
        last = 1 if base.view.kind == "conv" else like.dim() - 1  # the dimension of features
        return each.view(len(like), *[each.shape[1] if i == last else 1 for i in range(1, like.dim())])

    def of(name: str) -> list[Optional]:
        return [None if adapter is None else getattr(adapter, name)() for adapter in held]

    if (factor := vectors(of("scale_in"), x, 1.0)) is not None:
        x = x * factor
    y: torch.Tensor = base(x)
    if (factor := vectors(of("scale_out"), y, 1.0)) is not None:
        y = y * factor
    if (summand := vectors(of("shift"), y, 0.0)) is not None:
        y = y + summand
    return y


# --- low-rank products


def _added(given: Sequence[Factors | None], rows: Rows, x: torch.Tensor, base: Base) -> torch.Tensor:
    """base(x), with the product of each row's adapter added."""
    layout = _Layout(given, rows, x.device)
    factors = layout.factors
    product = base.product()
    dtype = None if product is None else fused_dtype(x, product[0])
    if product is None or dtype is None:
        y = base(x)
        units = _units(x, rows.units)
        seen = torch.cat([drop(units[first:last], p, training=True) for p, first, last in layout.chances])
        down, up, _ = layout.pairs([f.down for f in factors], [f.up for f in factors], {})
        z = seen.bmm(down.to(x.dtype).mT)
        return y + z.bmm(up.to(z.dtype).mT).view(y.shape).to(y.dtype)  # type: ignore[no-any-return]
    base.dtype = dtype
    pairs = [f.down for f in factors], [f.up for f in factors]
    if torch.is_grad_enabled() or any(p for p, _, _ in layout.chances):
        return _MixedLinear.apply(x, *product, layout, dtype, *pairs[0], *pairs[1])  # type: ignore[no-any-return,no-untyped-call]
    down, up, _ = layout.pairs(*pairs, {})
    pair = (down.to(dtype), up.to(dtype))
    if rows.kept is not None:
        rows.kept[id(base.view), dtype] = pair
    return _multiplied(x.to(dtype), *product, *pair)[0]


def _multiplied(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional, down: torch.Tensor, up: torch.Tensor, kept: Optional = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output `[..., out]` with the products of all units, and what is between the factors."""
    seen = units = _units(x, len(down))
    if kept is not None:
        seen = _number(kept, x).mul_(units)
    z = seen.bmm(down.mT)
    y = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    _units(y, len(up)).baddbmm_(z, up.mT)
    return y, z


def _units(x: torch.Tensor, units: int) -> torch.Tensor:
    """x `[rows, ..., n]` as `[units, m, n]`."""
    return x.reshape(units, x.numel() // (x.shape[-1] * units), x.shape[-1])


class _Layout:
    """Which factors each unit of the batch has."""

    def __init__(self, given: Sequence[Factors | None], rows: Rows, device: torch.device):
        self.given, self.units = given, rows.units
        self.factors = [f for f in given if f is not None]
        self.rank = max(f.down.shape[0] for f in self.factors)
        self.index = None if rows.whole else rows.adapter_of(rows.units, device)  # the adapter of each unit
        p = [self.factors[0].p if f is None else f.p for f in given]
        self.chances = [*_runs([p[place] for place in rows.places])]  # of dropout, unit by unit

    def pairs(
        self, downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], drawn: Mapping[float, float]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The factors of each unit, `[units, r, in]` and `[units, out, r]`, the scale in the second, and the scales of the
        adapters `[adapters, 1, 1]`. `drawn` has what makes up for dropout, by p."""
        down, up = self._laid(downs, 0), self._laid(ups, 1)
        scales = [0.0 if f is None else f.scale * drawn.get(f.p, 1.0) for f in self.given]
        scale = torch.tensor(scales, dtype=up.dtype, device=up.device).view(-1, 1, 1)
        return self._of_units(down), self._of_units(up * scale), scale

    def _laid(self, factors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The factors of the adapters as one tensor; smaller ranks, in dimension `dim`, are filled up with zeros."""
        if any(f.shape[dim] != self.rank for f in factors):
            factors = [pad(f, [0, 0] * (1 - dim) + [0, self.rank - f.shape[dim]]) for f in factors]
        if len(factors) < len(self.given):
            own, none = iter(factors), torch.zeros_like(factors[0])
            factors = [none if f is None else next(own) for f in self.given]
        return torch.stack([*factors])

    def _of_units(self, adapters: torch.Tensor) -> torch.Tensor:
        return adapters if self.index is None else adapters.index_select(0, self.index)

    def own(self, units: torch.Tensor, dim: int, scale: Optional = None) -> list[torch.Tensor]:
        """From gradients of the factors of units to those of adapters, in the ranks these have."""
        if self.index is not None:
            units = units.new_zeros(len(self.given), *units.shape[1:]).index_add_(0, self.index, units)
        units = units if scale is None else units * scale
        parts = [part for part, f in zip(units.unbind(), self.given, strict=True) if f is not None]
        ranks = [f.down.shape[0] for f in self.factors]
        return [p if r == self.rank else p.narrow(dim, 0, r) for p, r in zip(parts, ranks, strict=True)]

    def drawn(self, units: torch.Tensor) -> tuple[Optional, dict[float, float]]:
        """Which values dropout keeps, None for all, and the factors that make up for the others, by p."""
        if all(p == 0.0 for p, _, _ in self.chances):
            return None, {}
        kept, factors = [], dict[float, float]()
        for p, first, last in self.chances:
            if p == 0.0:
                mask = torch.ones_like(units[first:last], dtype=torch.bool)
            else:
                mask, factors[p] = keep_mask(units[first:last], p)
            kept.append(mask)
        return torch.cat(kept) if len(kept) > 1 else kept[0], factors


class _MixedLinear(torch.autograd.Function):
    """The layer and the products; `pairs` are all factors down, then all factors up. Gradients are those of one batch."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Optional, layout: _Layout, dtype: torch.dtype,
        *pairs: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        half, of_x = len(pairs) // 2, x.dtype
        x = x.to(dtype)
        kept, drawn = layout.drawn(_units(x, layout.units))
        down, up, scale = layout.pairs(pairs[:half], pairs[half:], drawn)
        down, up = down.to(dtype), up.to(dtype)
        y, z = _multiplied(x, weight, bias, down, up, kept)
        if any(ctx.needs_input_grad):
            ctx.layout, ctx.dtype, ctx.of_x = layout, dtype, of_x
            ctx.turned = isinstance(weight._base, torch.nn.Parameter)
            frozen = weight._base if ctx.turned else weight  # engines that free a parameter in between know it, not its view
            ctx.save_for_backward(x, frozen if ctx.needs_input_grad[0] else None, down, up, scale, z, kept)
        return y.data  # no view of another tensor: a model may write into what its layer returns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if would_cast(saved[2]):
            with torch.autocast(g.device.type, enabled=False):
                return _gradients(ctx, saved, g)
        return _gradients(ctx, saved, g)


def _gradients(ctx: Any, saved: tuple[Any, ...], g: torch.Tensor) -> tuple[Any, ...]:
    x, weight, down, up, scale, z, kept = saved
    layout, needed = ctx.layout, ctx.needs_input_grad[5:]
    g = g.to(ctx.dtype)
    g_units = _units(g, layout.units)
    d_z = g_units.bmm(up)
    mask = None if kept is None else _number(kept, g)
    d_x, d_pairs = None, [None] * len(needed)
    if any(needed):
        units = _units(x, layout.units)
        d_downs = layout.own(d_z.mT.bmm(units if mask is None else units * mask).to(scale.dtype), 0)
        d_ups = layout.own(g_units.mT.bmm(z).to(scale.dtype), 1, scale)
        d_pairs = [d if wanted else None for d, wanted in zip([*d_downs, *d_ups], needed, strict=True)]
    if ctx.needs_input_grad[0]:
        weight = weight.to(ctx.dtype)
        d_x = g.matmul(weight.t() if ctx.turned else weight)
        d_units = _units(d_x, layout.units)
        if mask is None:
            d_units.baddbmm_(d_z, down)
        else:
            d_units.addcmul_(d_z.bmm(down), mask)
        d_x = d_x.to(ctx.of_x)
    return d_x, None, None, None, None, *d_pairs


def _runs(values: Sequence[float]) -> Iterator[tuple[float, int, int]]:
    """Equal values that follow one another, with the first place and the one behind the last."""
    start = 0
    for value, run in itertools.groupby(values):
        length = len([*run])
        yield value, start, start + length
        start += length


def _number(kept: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return kept.view(torch.uint8).to(like.dtype)  # much faster than from bool
