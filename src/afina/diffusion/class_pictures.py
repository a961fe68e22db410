"""Pictures of a subject's class, made by the base itself: what it is to go on knowing."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from afina.core.files import write_atomically
from afina.diffusion.drawing import draw, without_prompt
from afina.diffusion.pictures import ENDINGS
from afina.diffusion.pipelines import load_part, make_pipeline, pipeline_config
from afina.memory.loading import device_of_process
from afina.memory.measure import release
from afina.memory.storage import FLOATS, Storage

__all__ = ["class_folder", "missing_pictures", "write_class_pictures"]


def class_folder(beside: Path, model: str, prompt: str) -> Path:
    """Where the pictures of a class lie unless another folder is named: of one base and one prompt, for all runs."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{Path(model).name} {prompt}".lower()).strip("-")
    return beside / "class_pictures" / name


def missing_pictures(folder: Path, count: int) -> int:
    """How many of them are still to be made."""
    return max(0, count - sum(p.suffix.lower() in ENDINGS for p in folder.iterdir())) if folder.is_dir() else count


@torch.no_grad()
def write_class_pictures(
    model: str, prompt: str, folder: Path, count: int, *, steps: int, size: int | None, weights: str,
    tell: Callable[[int], None] = lambda made: None,
) -> int:  # fmt: skip
    """Make those that are missing; the one of a number is the same whenever it is made. Returns how many were made.

    `weights` is fp32, bf16 or fp16, or auto: as the checkpoint has them.
    """
    if not missing_pictures(folder, count):
        return 0
    config, device = pipeline_config(model), device_of_process()
    own = next(name for name, dtype in FLOATS.items() if dtype == config.dtype)
    own = "fp32" if own == "fp16" and device.type == "cpu" else own  # which a CPU cannot compute
    storage = Storage(own if weights == "auto" else weights)
    texts = {
        part: load_part(config, part, storage).to(device) for part in config.family.text_encoders if part in config.parts
    }
    pipeline = make_pipeline(config, **texts)
    condition, empty = (config.family.condition(pipeline, [said], device, config.tokens) for said in (prompt, ""))
    del texts, pipeline
    release(device)
    core, vae = load_part(config, config.family.core, storage).to(device), load_part(config, "vae").to(device)
    none = without_prompt(config, condition, empty)
    side = size or int(core.config.get("sample_size") or 128) * 2 ** (len(vae.config.block_out_channels) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    made = number = 0
    while missing_pictures(folder, count):
        path = folder / f"{number:04}.png"
        if not path.exists():
            (picture,) = draw(config, core, vae, condition, none, seeds=[number], steps=steps, size=side)
            write_atomically(path, partial(picture.save, format="PNG"))
            made += 1
            tell(made)
        number += 1
    return made
