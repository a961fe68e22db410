"""Triton kernels of a low-rank product under dropout whose mask is stored nowhere: it follows from a seed, row and column.

Left to torch the mask is written, read, and turned into a masked copy of x, forward and backward, and stays in memory in
between. Here each kernel draws the part of it that it needs while it reads x once. Eight values share one block of
Philox4x32, sixteen bits each: value (row, column) stays where number `column % 8` of block (row, column // 8) is below
`keep`. Seven rounds are the fewest that passed every test of randomness by its authors (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405).

Sums are float32. Long ones are cut into parts that are added afterwards, in one order, so that results repeat bit for bit
on one card. Tensors are float32, float16 or bfloat16, all of one type; x and what is added to may have any row stride.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from afina.core.dropout import keep_steps

__all__ = ["MOST_RANKS", "add_product", "keep_mask", "product", "product_gradient"]

MOST_RANKS = 256
_EMULATED = 4  # processors, where there is no card
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def keep_mask(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    """Which values `[rows, columns]` (bool) stay, for a seed `[1]` (int64) and dropout's p."""
    kept = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    grid = triton.cdiv(rows, 32), triton.cdiv(columns, 64)
    with torch.cuda.device_of(seed):
        _keep_mask[grid](kept, seed, rows, columns, keep=keep_steps(p)[0], high=32, wide=64)
    return kept


def product(x: torch.Tensor, down: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """(x * mask) down.T `[rows, r]` for x `[rows, in]` and down `[r, in]`."""
    x, down = _in_rows(x), down.contiguous()
    (rows, columns), r = x.shape, len(down)
    high, wide, rank = _tile(x, r)
    steps, count = triton.cdiv(columns, wide), triton.cdiv(rows, high)
    parts, each = _parts(steps, count, x.device)
    z = torch.empty(parts, rows, r, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _product[count, parts](
            x, down, z, seed, rows, columns, x.stride(0), each * wide,
            keep=keep_steps(p)[0], r=r, padded=rank, high=high, wide=wide, **_arithmetic(x),
        )  # fmt: skip
    return z[0] if parts == 1 else z.sum(0).to(x.dtype)


def product_gradient(d_z: torch.Tensor, x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """d_z.T (x * mask) `[r, in]`, the gradient of `down`, for d_z `[rows, r]`."""
    x, d_z = _in_rows(x), d_z.contiguous()
    (rows, columns), r = x.shape, d_z.shape[1]
    high, wide, rank = _tile(x, r)
    steps, count = triton.cdiv(rows, high), triton.cdiv(columns, wide)
    parts, each = _parts(steps, count, x.device)
    made = torch.empty(parts, r, columns, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _product_gradient[count, parts](
            d_z, x, made, seed, rows, columns, x.stride(0), each * high,
            keep=keep_steps(p)[0], r=r, padded=rank, high=high, wide=wide, **_arithmetic(x),
        )  # fmt: skip
    return made[0] if parts == 1 else made.sum(0).to(x.dtype)


def add_product(to: torch.Tensor, d_z: torch.Tensor, down: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Add (d_z down) * mask to a tensor `[rows, in]` whose columns lie side by side, in place: the gradient of x."""
    d_z, down = d_z.contiguous(), down.contiguous()
    (rows, columns), r = to.shape, len(down)
    high, wide, rank = _tile(to, r)
    grid = triton.cdiv(rows, high), triton.cdiv(columns, wide)
    with torch.cuda.device_of(to):
        _add_product[grid](
            to, d_z, down, seed, rows, columns, to.stride(0),
            keep=keep_steps(p)[0], r=r, padded=rank, high=high, wide=wide, **_arithmetic(to),
        )  # fmt: skip
    return to


# --- how the work is divided


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """x `[rows, in]` with its columns side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(x: torch.Tensor, r: int) -> tuple[int, int, int]:
    """Rows and columns that are taken at once, and the rank as a power of two; tensor cores take at least 16 of each. For
    large ranks tiles are small, so that they find room."""
    rank = max(16, triton.next_power_of_2(r))
    return 32, max(16, min(64, 8192 // (rank * x.element_size()))), rank


def _parts(steps: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts a sum of so many steps is cut, that all processors have work, and the steps of each."""
    each = triton.cdiv(steps, max(1, min(steps, 2 * _processors(device) // tiles)))
    return triton.cdiv(steps, each), each


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _EMULATED


def _arithmetic(x: torch.Tensor) -> dict[str, Any]:
    """Of products: those of float32 as torch's own are set; those of bfloat16 are wrong in Triton's interpreter."""
    own = torch.backends.cuda.matmul
    named = getattr(own, "fp32_precision", None)  # since torch 2.9, where the older switch raises once this one was set
    fast = x.dtype is torch.float32 and (own.allow_tf32 if named is None else named == "tf32")
    return {"precision": "tf32" if fast else "ieee", "widen": x.dtype is torch.bfloat16 and _INTERPRETED}


# --- kernels; what is tl.constexpr is known when they are compiled; high and wide: rows and columns taken at once


@triton.jit
def _kept(
    seed: tl.tensor, row: tl.tensor, first: tl.tensor, keep: tl.constexpr, high: tl.constexpr, wide: tl.constexpr
) -> tl.tensor:
    none = tl.zeros([high, wide // 8], tl.int32)
    eight = first // 8 + tl.arange(0, wide // 8)
    a, b, c, d = tl.philox(seed, row[:, None] + none, eight[None, :] + none, none, none, n_rounds=7)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # in the order a, b, c, d
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [high, wide])
    return bits < keep


@triton.jit(do_not_specialize=["rows"])
def _keep_mask(
    kept: tl.tensor, seeds: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    keep: tl.constexpr, high: tl.constexpr, wide: tl.constexpr,
) -> None:  # fmt: skip
    row, first = tl.program_id(0) * high + tl.arange(0, high), tl.program_id(1) * wide
    column = first + tl.arange(0, wide)
    stays = _kept(tl.load(seeds), row, first, keep, high, wide)
    place = kept + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, stays, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _product(
    x: tl.tensor, down: tl.tensor, z: tl.tensor, seeds: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    stride: tl.tensor, each: tl.tensor,
    keep: tl.constexpr, r: tl.constexpr, padded: tl.constexpr, high: tl.constexpr, wide: tl.constexpr,
    precision: tl.constexpr, widen: tl.constexpr,
) -> None:  # fmt: skip
    seed, part = tl.load(seeds), tl.program_id(1)
    row, rank = tl.program_id(0) * high + tl.arange(0, high), tl.arange(0, padded)
    there = (row < rows)[:, None]
    x += row.to(tl.int64)[:, None] * stride
    total = tl.zeros([high, padded], tl.float32)
    for first in range(part * each, min(columns, part * each + each), wide):
        column = first + tl.arange(0, wide)
        inside = (column < columns)[None, :]
        seen = tl.load(x + column[None, :], mask=there & inside, other=0.0)
        seen = tl.where(_kept(seed, row, first, keep, high, wide), seen, 0.0)
        a = tl.load(down + rank[:, None] * columns + column[None, :], mask=(rank < r)[:, None] & inside, other=0.0)
        if widen:
            seen, a = seen.to(tl.float32), a.to(tl.float32)
        total = tl.dot(seen, tl.trans(a), total, input_precision=precision)
    place = z + (part * rows + row).to(tl.int64)[:, None] * r + rank[None, :]
    tl.store(place, total.to(z.dtype.element_ty), mask=there & (rank < r)[None, :])


@triton.jit(do_not_specialize=["rows", "each"])
def _product_gradient(
    d_z: tl.tensor, x: tl.tensor, made: tl.tensor, seeds: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    stride: tl.tensor, each: tl.tensor,
    keep: tl.constexpr, r: tl.constexpr, padded: tl.constexpr, high: tl.constexpr, wide: tl.constexpr,
    precision: tl.constexpr, widen: tl.constexpr,
) -> None:  # fmt: skip
    seed, part, first = tl.load(seeds), tl.program_id(1), tl.program_id(0) * wide
    column, rank = first + tl.arange(0, wide), tl.arange(0, padded)
    inside, ranks = (column < columns)[None, :], rank < r
    total = tl.zeros([padded, wide], tl.float32)
    for above in range(part * each, min(rows, part * each + each), high):
        row = above + tl.arange(0, high)
        there = (row < rows)[:, None]
        at = row.to(tl.int64)[:, None]
        seen = tl.load(x + at * stride + column[None, :], mask=there & inside, other=0.0)
        seen = tl.where(_kept(seed, row, first, keep, high, wide), seen, 0.0)
        g = tl.load(d_z + at * r + rank[None, :], mask=there & ranks[None, :], other=0.0)
        if widen:
            seen, g = seen.to(tl.float32), g.to(tl.float32)
        total = tl.dot(tl.trans(g), seen, total, input_precision=precision)
    place = made + (part * r + rank)[:, None] * columns + column[None, :]
    tl.store(place, total.to(made.dtype.element_ty), mask=ranks[:, None] & inside)


@triton.jit(do_not_specialize=["rows"])
def _add_product(
    to: tl.tensor, d_z: tl.tensor, down: tl.tensor, seeds: tl.tensor, rows: tl.tensor, columns: tl.tensor, stride: tl.tensor,
    keep: tl.constexpr, r: tl.constexpr, padded: tl.constexpr, high: tl.constexpr, wide: tl.constexpr,
    precision: tl.constexpr, widen: tl.constexpr,
) -> None:  # fmt: skip
    row, first = tl.program_id(0) * high + tl.arange(0, high), tl.program_id(1) * wide
    column, rank = first + tl.arange(0, wide), tl.arange(0, padded)
    there, inside, ranks = (row < rows)[:, None], (column < columns)[None, :], rank < r
    at = row.to(tl.int64)[:, None]
    g = tl.load(d_z + at * r + rank[None, :], mask=there & ranks[None, :], other=0.0)
    a = tl.load(down + rank[:, None] * columns + column[None, :], mask=ranks[:, None] & inside, other=0.0)
    if widen:
        g, a = g.to(tl.float32), a.to(tl.float32)
    added = tl.dot(g, a, input_precision=precision)
    added = tl.where(_kept(tl.load(seeds), row, first, keep, high, wide), added, 0.0)
    place = to + at * stride + column[None, :]
    before = tl.load(place, mask=there & inside, other=0.0)
    tl.store(place, (before + added).to(to.dtype.element_ty), mask=there & inside)
