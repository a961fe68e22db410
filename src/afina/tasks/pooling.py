"""One vector a text out of the vectors of its tokens.

A folder in the layout of sentence-transformers says how, in `modules.json` and `1_Pooling/config.json`, and what it says is
done; a layer between pooling and vector that afina does not apply is an error. Elsewhere encoders take the mean of all
tokens and decoders the last token, which alone has read the whole text.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from afina.core.config import resolve_file
from afina.errors import ConfigError

__all__ = ["POOLINGS", "find_pooling", "pooled", "reads_forward_only"]

POOLINGS = ("mean", "cls", "last", "max")
_KEYS = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}  # fmt: skip
_KNOWN = {"Transformer", "Pooling", "Normalize"}


def find_pooling(path: str, config: Any) -> str:
    """How the model of this folder or hub id makes a vector; raises ConfigError where that cannot be done here."""
    modules = resolve_file(path, "modules.json", required=False)
    if modules is None:
        return "last" if reads_forward_only(config) else "mean"
    types = [str(entry["type"]).rpartition(".")[2] for entry in json.loads(modules.read_text(encoding="utf-8"))]
    if unknown := sorted(set(types) - _KNOWN):
        raise ConfigError(
            f"model {path}: its vectors pass through a {unknown[0]} module (modules.json), which is not supported; say how "
            f"to pool without it by task.pooling={'|'.join(POOLINGS)}, or take another model"
        )
    place = next((e["path"] for e in json.loads(modules.read_text(encoding="utf-8")) if e["type"].endswith("Pooling")), None)
    file = resolve_file(path, "config.json", subfolder=place, required=False) if place else None
    if file is None:
        return "mean"
    said = json.loads(file.read_text(encoding="utf-8"))
    chosen = [key for key, value in said.items() if key.startswith("pooling_mode") and value is True]
    names = [_KEYS.get(key, key) for key in chosen] or [str(said.get("pooling_mode", "mean")).replace("lasttoken", "last")]
    if len(names) != 1 or names[0] not in POOLINGS:
        raise ConfigError(f"model {path} pools by {' and '.join(names)}; supported is one of {', '.join(POOLINGS)}")
    return names[0]


def reads_forward_only(config: Any) -> bool:
    """Whether models of this architecture see no token that follows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Vectors `[rows, width]`, float32, of length 1, from `hidden [rows, tokens, width]` and `mask [rows, tokens]`.

    Rows are padded on the right. Positions that a method puts in front of the text are no part of it.
    """
    hidden = hidden[:, hidden.shape[1] - mask.shape[1] :].float()
    inside = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling == "mean":
        made = (hidden * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1)
    elif pooling == "max":
        made = hidden.masked_fill(inside == 0, -torch.inf).amax(dim=1)
    elif pooling == "cls":
        made = hidden[:, 0]
    else:
        made = hidden[torch.arange(len(mask), device=mask.device), mask.sum(dim=1) - 1]
    return torch.nn.functional.normalize(made, dim=-1)
