"""Text that a model writes: greedily or by beams, so that the same question always gets the same answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["generated", "left_padded"]

# What a checkpoint may ask of sampling, which is not done here.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def left_padded(rows: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[rows, longest]` and their mask, padded on the left: what is written must follow on the text (T23)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


@torch.no_grad()
def generated(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    max_new_tokens: int,
    num_beams: int,
    ends: Sequence[int],
    pad: int,
) -> list[list[int]]:
    """The new tokens of each row, without the token that ends them. Batches of decoders are padded on the left."""
    settings = copy.deepcopy(model.generation_config)
    for name in _SAMPLING:
        setattr(settings, name, None)
    settings.update(
        do_sample=False, num_beams=num_beams, max_length=None, max_new_tokens=max_new_tokens, min_length=0,
        eos_token_id=list(ends), pad_token_id=pad,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    try:
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    finally:
        model.train(was_training)
    first = 1 if model.config.is_encoder_decoder else ids.shape[1]
    return [_up_to_end(row, ends) for row in written[:, first:].tolist()]


def _up_to_end(row: list[int], ends: Sequence[int]) -> list[int]:
    places = [i for i, token in enumerate(row) if token in ends]
    return row[: places[0]] if places else row
