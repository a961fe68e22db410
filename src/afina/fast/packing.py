"""Rows one behind the other instead of one below the other: no padding, and no row sees another.

The tokens of several rows become one row of the batch, whose positions start anew where a row of old begins. A model of
transformers that is given such positions, and no mask, builds a mask of blocks from them, or hands the lengths to kernels
that take rows of any length. Not all do: some count positions by themselves, some carry a state along, and all do wrong
with a cache of keys. So a model is tried before it is trusted (`sees_others`, T26): rows packed must give what they give
alone, and must give the same, to the last bit, when the row in front of them changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["packed", "sees_others"]

_TOGETHER = 4096  # tokens of a packed row, so that a mask of blocks, tokens by tokens, stays small


def packed(batch: Mapping[str, torch.Tensor], most: int = _TOGETHER) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of a batch, packed into as few rows of at most `most` tokens as their order allows; a longer one stays alone.

    Takes `input_ids`, `attention_mask` and maybe `labels`, `[rows, tokens]`, padded on the right. Gives `input_ids`,
    `position_ids` and `labels`, `[1, tokens]`; the first token of each row is no target, as nothing stands before it.
    """
    mask = batch["attention_mask"].bool()
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    groups, room = list[list[int]](), 0
    for row, length in enumerate(mask.sum(1).tolist()):
        if not groups or length > room:
            groups.append([])
            room = most
        groups[-1].append(row)
        room -= length
    for group in groups:
        kept = mask[group]
        made = {"input_ids": batch["input_ids"][group][kept][None], "position_ids": places[group][kept][None]}
        if "labels" in batch:
            made["labels"] = batch["labels"][group][kept][None].masked_fill(made["position_ids"] == 0, -100)
        yield made


@torch.no_grad()
def sees_others(model: Any, batch: Mapping[str, torch.Tensor], close: float) -> str | None:
    """Why rows may not be packed for this causal model; None where they may. `model` is in evaluation.

    `batch` has two rows or more, as `packed` takes them; `close` is how far logits may be from those of a row alone,
    relative to the largest.
    """

    def logits(one: Mapping[str, torch.Tensor]) -> torch.Tensor:
        inputs = {key: one[key] for key in ("input_ids", "position_ids")}
        return model(**inputs, use_cache=False).logits[0].float()  # type: ignore[no-any-return]

    lengths = batch["attention_mask"].sum(1).tolist()
    try:
        (together,) = packed(batch, sum(lengths))
        found = logits(together)
        rows = zip(together["input_ids"].split(lengths, 1), together["position_ids"].split(lengths, 1), strict=True)
        expected = torch.cat([logits({"input_ids": ids, "position_ids": places}) for ids, places in rows])
        other = together["input_ids"].clone()
        other[:, : lengths[0]] = other[:, : lengths[0]].flip(1).add(1) % found.shape[1]
        moved = logits({**together, "input_ids": other})
    except (TypeError, ValueError, RuntimeError) as error:
        return f"it takes no positions that start anew ({str(error).splitlines()[0][:100]})"
    if not torch.equal(moved[lengths[0] :], found[lengths[0] :]):
        return "its rows see those in front of them"
    if not float((found - expected).abs().max()) <= close * max(1.0, float(expected.abs().max())):
        return "its rows give something else than alone"
    return None
