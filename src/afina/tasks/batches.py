"""Batches out of lists of different lengths: padded on the right and masked by position.

Always on the right, whatever the tokenizer says of its padding side: a decoder that pools the last token finds it by the
first padding id (T22), and a padding token that is also the end token must not be taken for text (T20).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["has_values", "pad_right", "padded"]


def padded(rows: Sequence[Sequence[int]], value: int, width: int = 0) -> torch.Tensor:
    """Integers `[rows, longest]`, or `[rows, width]` where that is more, filled with `value` on the right."""
    width = max(width, *(len(row) for row in rows))
    made = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        made[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return made


def pad_right(features: Sequence[dict[str, Any]], pad_id: int, width: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and, where the features have them, `token_type_ids`, each `[rows, tokens]`: as many as
    the longest has, or `width` where that is more."""
    ids = [f["input_ids"] for f in features]
    batch = {"input_ids": padded(ids, pad_id, width), "attention_mask": padded([[1] * len(row) for row in ids], 0, width)}
    if "token_type_ids" in features[0]:
        batch["token_type_ids"] = padded([f["token_type_ids"] for f in features], 0, width)
    return batch


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there is more of a tensor than its shape."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not tensor.is_meta and not isinstance(tensor, FakeTensor)
