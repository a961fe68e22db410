"""Figures of pairs of which one is known to be better: how often it is scored higher, and by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["longer_is_better", "pair_figures", "share_interval"]

_Z = 1.959963984540054  # two-sided 95 %


def pair_figures(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """`accuracy`: the share of pairs whose first score is higher, where equal scores count half; `accuracy_interval`, 95 %;
    `margin`: the mean difference."""
    made = np.asarray(scores, dtype=float)
    apart = made[:, 0] - made[:, 1]
    right = float((apart > 0).mean() + (apart == 0).mean() / 2)
    return {"accuracy": right, "accuracy_interval": list(share_interval(right * len(made), len(made))),
            "margin": float(apart.mean())}  # fmt: skip


def share_interval(hits: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share of rows (Wilson 1927)."""
    share, square = hits / rows, _Z * _Z
    middle = (share + square / (2 * rows)) / (1 + square / rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows)) / (1 + square / rows)
    return max(0.0, middle - half), min(1.0, middle + half)


def longer_is_better(
    train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]
) -> tuple[str, list[tuple[float, float]]]:
    """What knows nothing but the length of answers, and which length the training pairs prefer: a title, and the scores of
    each test pair."""
    longer = sum((len(a) > len(b)) - (len(a) < len(b)) for a, b in train)
    sign = 1.0 if longer >= 0 else -1.0
    title = f"the {'longer' if sign > 0 else 'shorter'} answer is better"
    return title, [(sign * len(a), sign * len(b)) for a, b in test]
