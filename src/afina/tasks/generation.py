"""Text that a model writes: greedily or by beams, so that the same question always gets the same answer; or drawn by
chance, from numbers that are given, so that what is drawn for a row does not depend on the rows beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["drawn", "generated", "left_padded"]

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
    written = _written(model, ids, mask, max_new_tokens, num_beams, ends, pad)
    first = 1 if model.config.is_encoder_decoder else ids.shape[1]
    return [_up_to_end(row, ends) for row in written[:, first:].tolist()]


@torch.no_grad()
def drawn(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, chances: torch.Tensor, *, temperature: float, ends: Sequence[int],
    pad: int,
) -> list[list[int]]:  # fmt: skip
    """New tokens of each row of a decoder's batch, padded on the left, with the token that ends them where one does.

    Each is drawn from the model's distribution at `temperature` by one of `chances` `[rows, tokens]`, numbers from 0 to 1.
    """
    draw = _Draw(chances.to(ids.device), temperature, ids.shape[1])
    written = _written(model, ids, mask, chances.shape[1], 1, ends, pad, draw)
    rows = written[:, ids.shape[1] :].tolist()
    return [[*found, *row[len(found) : len(found) + 1]] for row in rows for found in [_up_to_end(row, ends)]]


class _Draw:
    """A processor of logits that leaves one token: the first at which the summed probabilities exceed the row's number."""

    def __init__(self, chances: torch.Tensor, temperature: float, start: int):
        self.chances, self.temperature, self.start = chances, temperature, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sums = torch.softmax(scores.float() / self.temperature, dim=-1).cumsum(-1)
        wanted = self.chances[:, input_ids.shape[1] - self.start, None] * sums[:, -1:]
        chosen = torch.searchsorted(sums, wanted, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _written(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, num_beams: int, ends: Sequence[int], pad: int,
    draw: _Draw | None = None,
) -> torch.Tensor:  # fmt: skip
    settings = copy.deepcopy(model.generation_config)
    for name in _SAMPLING:
        setattr(settings, name, None)
    settings.update(
        do_sample=False, num_beams=num_beams, max_length=None, max_new_tokens=max_new_tokens, min_length=0,
        eos_token_id=list(ends), pad_token_id=pad,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    own = {} if draw is None else {"logits_processor": [draw]}
    try:
        return model.generate(  # type: ignore[no-any-return]
            input_ids=ids, attention_mask=mask, generation_config=settings, **own
        )
    finally:
        model.train(was_training)


def _up_to_end(row: list[int], ends: Sequence[int]) -> list[int]:
    places = [i for i, token in enumerate(row) if token in ends]
    return row[: places[0]] if places else row
