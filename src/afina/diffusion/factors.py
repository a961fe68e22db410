"""The low-rank factors of an adapter, and the two forms of file in which they go from one program to another.

`Factors` are keyed by the path of their layer in the pipeline (`unet.down_blocks.0...`). Files of diffusers hold them under
such names (PEFT's names for the factors), with what they are scaled by already in the second factor, so that programs that
know of no `alpha` read them right too; Kohya's files hold `alpha` beside them (`kohya.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from afina.core.checkpoint import PREFIX, WEIGHTS_NAME, read_state
from afina.core.config import AdapterConfig
from afina.core.files import read_weights, write_weights
from afina.errors import CheckpointError, ConfigError, Problems, shortened

__all__ = [
    "DIFFUSERS_NAME",
    "Factors",
    "adapter_of",
    "factors_of_adapter",
    "from_diffusers",
    "portable",
    "read_factors",
    "refuse_left",
    "to_diffusers",
]

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # what diffusers writes of rank and alpha
_FORMS = ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"),
          (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"))  # fmt: skip


@dataclass
class Factors:
    """Of one layer: what is added is `alpha / rank * up @ down`; `down [rank, in, ...]`, `up [out, rank, ...]`."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return int(self.down.shape[0])


def factors_of_adapter(folder: Path) -> dict[str, Factors]:
    """Of an adapter folder. Raises ConfigError where it is more than low-rank factors."""
    config: Any = AdapterConfig.from_pretrained(folder)
    if config.peft_type != "LORA" or getattr(config, "use_dora", False):
        name = "DoRA" if getattr(config, "use_dora", False) else str(config.peft_type)
        raise ConfigError(
            f"{folder} is {name}: such files hold the factors of LoRA alone. Answer with the run as it is, or train with "
            "method lora"
        )
    made: dict[str, Factors] = {}
    others = []
    state = read_state(folder)
    for key, down in state.items():
        path, _, leaf = key.removeprefix(PREFIX).rpartition(".lora_")
        if leaf == "A.weight":
            own = config.for_module(path)
            rank = int(down.shape[0])
            alpha = own.lora_alpha * (rank**0.5 if own.use_rslora else 1)
            made[path] = Factors(down, state[f"{PREFIX}{path}.lora_B.weight"], float(alpha))
        elif leaf != "B.weight":
            others.append(key)
    if others:
        raise ConfigError(f"{folder} holds what is no factor of LoRA, which such files cannot hold: {shortened(others)}")
    return made


def adapter_of(factors: Mapping[str, Factors], folder: Path, base: str) -> None:
    """Write factors as an adapter folder, for the base of that name."""
    from afina.methods.lora import LoraConfig

    first = next(iter(factors.values()))
    ranks = {_whole(path): f.rank for path, f in factors.items() if f.rank != first.rank}
    alphas: dict[str, Any] = {_whole(path): f.alpha for path, f in factors.items() if f.alpha != first.alpha}
    config = LoraConfig(
        r=first.rank, lora_alpha=_plain(first.alpha), target_modules=sorted(factors), rank_pattern=ranks,
        alpha_pattern={path: _plain(alpha) for path, alpha in alphas.items()}, base_model_name_or_path=base,
        inference_mode=True,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"{PREFIX}{path}.lora_{k}.weight": t for path, f in factors.items() for k, t in (("A", f.down), ("B", f.up))}
    write_weights(folder / WEIGHTS_NAME, state, {})
    config.save_pretrained(folder)


def _whole(path: str) -> str:
    """A pattern that means this path alone."""
    import re

    return f"^{re.escape(path)}$"


def _plain(alpha: float) -> Any:
    return int(alpha) if alpha == int(alpha) else alpha


# --- diffusers


def to_diffusers(factors: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """As diffusers' `load_lora_weights` reads them."""
    made = {}
    for path, own in factors.items():
        scale = own.alpha / own.rank
        named = portable(path)
        made[f"{named}.lora_A.weight"] = own.down
        made[f"{named}.lora_B.weight"] = own.up if scale == 1 else (own.up.float() * scale).to(own.up.dtype)
    return made


def from_diffusers(
    state: Mapping[str, torch.Tensor], paths: Iterable[str], metadata: Mapping[str, str] | None = None
) -> dict[str, Factors]:
    """Factors in the order of the file, for layers at `paths`. Raises CheckpointError with every key that fits nothing."""
    known = {portable(path): path for path in paths}
    said: dict[str, Any] = json.loads((metadata or {}).get(_METADATA, "{}"))
    made, used = dict[str, Factors](), set[str]()
    for key, down in state.items():
        for first, second in _FORMS:
            path = key.removesuffix(first)
            if path != key and path in known and (other := f"{path}{second}") in state:
                alpha = float(state[f"{path}.alpha"]) if f"{path}.alpha" in state else _alpha(path, down.shape[0], said)
                made[known[path]] = Factors(down, state[other], alpha)
                used |= {key, other, f"{path}.alpha"}
    refuse_left(sorted(state.keys() - used), "diffusers")
    return made


def _alpha(path: str, rank: int, said: Mapping[str, Any]) -> float:
    part, _, inside = path.partition(".")
    patterns = said.get(f"{part}.alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if inside == k or inside.endswith(f".{k}")), said.get(f"{part}.lora_alpha"))
    return float(rank if alpha is None else alpha * (rank**0.5 if said.get(f"{part}.use_rslora") else 1))


def portable(path: str) -> str:
    """The name of a layer in files: text encoders had one level more when the names were made."""
    part, _, inside = path.partition(".")
    if part.startswith("text_encoder") and inside.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        return f"{part}.text_model.{inside}"
    return path


def refuse_left(left: list[str], form: str) -> None:
    if left:
        problems = Problems(f"a file of {form}")
        problems.add(f"{len(left)} keys fit no layer of this pipeline: {shortened(left, 12)}")
        problems.raise_as(CheckpointError, "It belongs to another kind of pipeline, or holds more than factors of LoRA.")


def read_factors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], family: Any, layers_per_block: int
) -> dict[str, Factors]:
    """Factors of a file, Kohya's or diffusers', told by its keys; `shapes` are those of the pipeline's weights by path.

    Raises CheckpointError where the file is none, or does not fit.
    """
    from safetensors import safe_open

    from afina.diffusion.kohya import from_kohya

    state = read_weights(path)
    if any(key.startswith("lora_") for key in state):
        made = from_kohya(state, family, shapes, layers_per_block)
    else:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        made = from_diffusers(state, shapes, metadata)
    if not made:
        raise CheckpointError(f"{path} holds no factors of LoRA")
    for name, own in made.items():
        wanted = shapes[name]
        if own.down.shape[1] != wanted[1] or own.up.shape[0] != wanted[0]:
            raise CheckpointError(
                f"{path}: {name} has factors of {list(own.up.shape)} and {list(own.down.shape)}, the layer {list(wanted)}"
            )
    return made
