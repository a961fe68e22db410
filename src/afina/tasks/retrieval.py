"""How well right passages are found: their places in the order of the scores, and the figures that search is measured by.

nDCG@10 with a gain of one a right passage (Järvelin and Kekäläinen, 2002, https://doi.org/10.1145/582415.582418), MRR@10
(the inverse place of the first right passage, 0 beyond the tenth) and recall@k (the share of right passages among the
first k) are means over queries. Passages with equal scores share the mean of their places, so that scores that say nothing
are worth nothing. Intervals come from drawing the queries again, with replacement, 1,000 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CUT", "RECALLS", "Ranking", "figures_of", "of_query", "ranking"]

CUT = 10  # places that nDCG and MRR look at
RECALLS = (1, 5, 10)
KEYS = ("ndcg_at_10", "mrr_at_10", *(f"recall_at_{k}" for k in RECALLS))
_DRAWS, _AT_ONCE = 1000, 50


@dataclass(frozen=True)
class Ranking:
    """Of one query."""

    places: np.ndarray  # of its right passages, from 1, ascending
    ranks: dict[int, float]  # by the number of each right passage: 1 + the wrong ones before it
    wrong: int  # number of the wrong passage that comes first; -1 where there are none


def ranking(scores: np.ndarray, passages: np.ndarray, right: Sequence[int], left_out: Sequence[int] = ()) -> Ranking:
    """From scores `[passages]` of passages with these numbers, each once; those that are `left_out` are not there."""
    own = np.isin(passages, right)
    others = ~own & ~np.isin(passages, left_out)
    wrong = scores[others]
    order = np.flatnonzero(own)[np.argsort(-scores[own], kind="stable")]
    before = np.array([(wrong > s).sum() + (wrong == s).sum() / 2 for s in scores[order]])
    ranks = {int(passages[i]): 1 + float(n) for i, n in zip(order, before, strict=True)}
    first = int(passages[others][wrong.argmax()]) if len(wrong) else -1
    return Ranking(before + np.arange(1, len(order) + 1), ranks, first)


def of_query(places: np.ndarray) -> list[float]:
    """nDCG@10, MRR@10 and the recalls of one query from the places of its right passages, ascending."""
    near = places[places <= CUT]
    ideal = (1 / np.log2(1 + np.arange(1, min(len(places), CUT) + 1))).sum()
    found = [(1 / np.log2(1 + near)).sum() / ideal, 1 / near[0] if len(near) else 0.0]
    return [float(x) for x in (*found, *((places <= k).mean() for k in RECALLS))]


def figures_of(places: Sequence[np.ndarray]) -> dict[str, Any]:
    """Means over queries and their 95 % intervals (`KEY_interval`), from the places of each query; each has a right one."""
    values = np.array([of_query(own) for own in places])
    queries, chance = len(values), np.random.default_rng(0)
    drawn = np.concatenate([
        chance.multinomial(queries, np.full(queries, 1 / queries), size=_AT_ONCE) @ values for _ in range(_DRAWS // _AT_ONCE)
    ]) / queries  # fmt: skip
    ends = np.quantile(drawn, [0.025, 0.975], axis=0).T
    made: dict[str, Any] = {"queries": queries, **dict(zip(KEYS, values.mean(axis=0).tolist(), strict=True))}
    return {**made, **{f"{key}_interval": [float(x) for x in pair] for key, pair in zip(KEYS, ends, strict=True)}}
