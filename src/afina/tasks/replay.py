"""What is drawn by chance in a pass through a model, drawn again in a second one: dropout stays what it was."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["chance_of", "draw_again"]


def chance_of(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators, that of a GPU too where the model is there, to be put into a batch."""
    found = {"chance": torch.get_rng_state()}
    if device.type == "cuda":
        found["chance_of_device"] = torch.cuda.get_rng_state(device)
    return found


def draw_again(batch: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Go on as from where `chance_of` was asked for this batch; nothing where it was not."""
    if "chance" in batch:
        torch.set_rng_state(batch["chance"].cpu())
    if "chance_of_device" in batch:
        torch.cuda.set_rng_state(batch["chance_of_device"].cpu(), device)
