"""Adapter folders in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, and beside them `afina.json`
with what PEFT does not keep (the base's fingerprint, the tokenizer's hash) and the encoders of prompts.

Reading is strict: a key that is missing, unused or misshapen is an error that lists them all (T1). Keys that fit once a
prefix is changed, as for the same model under another class, are renamed, and that is said (T4).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from afina.core.config import resolve_file
from afina.core.files import read_weights, write_atomically, write_weights
from afina.core.injection import AdapterSet
from afina.errors import CheckpointError, Problems, shortened

__all__ = ["EXTRA_NAME", "WEIGHTS_NAME", "LoadReport", "adapter_state", "assign", "find_prefix", "read_extra", "read_state"]

WEIGHTS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
ENCODER_NAME = "prompt_encoder.safetensors"
EXTRA_NAME = "afina.json"
PREFIX, PROMPT_PREFIX = "base_model.model.", "base_model."
logger = logging.getLogger("afina")


@dataclass
class LoadReport:
    """What became of the keys of a file."""

    loaded: int = 0
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[str] = field(default_factory=list)
    renamed: tuple[str, str] | None = None


def adapter_state(adapters: AdapterSet, name: str) -> dict[str, torch.Tensor]:
    """Every tensor of one adapter under its key in PEFT's files. The tensors are the live ones, not copies."""
    adapters.check_names([name])
    state: dict[str, torch.Tensor] = {}
    prefix = PREFIX
    if name in adapters.prompts:
        state.update(adapters.prompts[name].stored())  # type: ignore[operator]
        prefix = PROMPT_PREFIX
    nested: dict[str, list[str]] = {}
    for key, layer in adapters.layers.items():
        if name in layer.adapters:
            nested.setdefault(key.split("#")[0], []).append(key)
    for path, keys in nested.items():
        for depth, key in enumerate(reversed(keys)):  # the wrapper put on last is outermost
            below = ".base_layer" * depth
            for inner, tensor in adapters.layers[key].adapters[name].stored().items():  # type: ignore[operator]
                state[f"{prefix}{path}{below}.{inner}"] = tensor
    return state


# --- reading


def read_state(source: Any, subfolder: str | None = None, **hub: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adapter in a folder or on the hub, safetensors before `.bin`."""
    path = resolve_file(source, WEIGHTS_NAME, subfolder=subfolder, required=False, **hub)
    path = path or resolve_file(source, BIN_NAME, subfolder=subfolder, required=False, **hub)
    if path is None:
        folder = Path(source)
        hint = ""
        if folder.is_dir() and (folder / "model.safetensors").is_file():
            hint = (
                " It has a model.safetensors: a checkpoint of transformers' Trainer. Resume it with "
                "trainer.train(resume_from_checkpoint=...), or save the adapter with model.save_pretrained(folder)."
            )
        raise CheckpointError(f"{source} has neither {WEIGHTS_NAME} nor {BIN_NAME}.{hint}")
    state = read_weights(path)
    return {key: tensor for key, tensor in state.items() if not any(_without(key, w) in state for w in _WRAPPERS)}


_WRAPPERS = ("modules_to_save.", "original_module.")  # with bias="all" PEFT stores a head's bias under these names too


def _without(key: str, wrapper: str) -> str | None:
    return key.replace(f".{wrapper}", ".") if f".{wrapper}" in key else None


def read_extra(source: Any, subfolder: str | None = None, **hub: Any) -> dict[str, Any]:
    """`afina.json`, or an empty table where PEFT wrote the folder."""
    path = resolve_file(source, EXTRA_NAME, subfolder=subfolder, required=False, **hub)
    if path is None:
        return {}
    try:
        extra = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(extra, dict):
        raise CheckpointError(f"{path} holds a {type(extra).__name__}; expected a table")
    return extra


def assign(
    state: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    source: str,
    *,
    strict: bool = True,
    layers: Iterable[str] = (),
) -> LoadReport:
    """Put the tensors of a file into the live ones of an adapter.

    A change of prefix that makes keys fit must lie above the layers, whose paths `layers` names. Raises CheckpointError
    listing every missing, unused and misshapen key; with `strict=False` they are reported.
    """
    report = LoadReport()
    state, report.renamed = _renamed(state, expected, layers)
    report.unexpected_keys = sorted(state.keys() - expected.keys())
    report.mismatched_keys = sorted(k for k in state.keys() & expected.keys() if state[k].shape != expected[k].shape)
    filled = {id(expected[k]) for k in state.keys() & expected.keys()}
    report.missing_keys = sorted(k for k in expected.keys() - state.keys() if id(expected[k]) not in filled)
    problems = Problems(source)
    if report.missing_keys:
        problems.add(f"{len(report.missing_keys)} keys are missing in the file: {shortened(report.missing_keys, 12)}")
    if report.unexpected_keys:
        problems.add(f"{len(report.unexpected_keys)} keys of the file fit nothing: {shortened(report.unexpected_keys, 12)}")
    if report.mismatched_keys:
        shapes = [f"{k} is {list(state[k].shape)}, expected {list(expected[k].shape)}" for k in report.mismatched_keys]
        problems.add(f"{len(shapes)} keys have another shape: {shortened(shapes, 12)}")
    broken = sorted(k for k, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all()))
    if broken:
        problems.add(f"{len(broken)} tensors hold values that are not finite: {shortened(broken, 12)}")
    if problems.found and not strict:
        logger.warning("%s: %s", source, "; ".join(problems.found))
    problems.found = problems.found if strict else []
    problems.raise_as(
        CheckpointError,
        "The file belongs to another model or configuration: load it on its own base, or pass strict=False to load what "
        "fits and get the counts.",
    )
    with torch.no_grad():
        for key in state.keys() & expected.keys() - set(report.mismatched_keys):
            live, tensor = expected[key], state[key]
            if type(live.data) is torch.Tensor and not live.is_meta:
                live.data = tensor.to(live.device, live.dtype, copy=True)
            else:  # a shard
                live.copy_(tensor.to(live.dtype))
            report.loaded += 1
    return report


def _renamed(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], layers: Iterable[str]
) -> tuple[dict[str, torch.Tensor], tuple[str, str] | None]:
    unmatched, free = [k for k in state if k not in expected], [k for k in expected if k not in state]
    change = find_prefix(unmatched, free) if unmatched and free else None
    if change is None or any(change[1].startswith(f"{prefix}{n}.") for prefix in (PREFIX, PROMPT_PREFIX) for n in layers):
        return dict(state), None
    old, new = change
    logger.warning("adapter keys renamed: %r is %r in this model", old, new)
    return {(new + k[len(old) :] if k in set(unmatched) else k): t for k, t in state.items()}, change


def find_prefix(names: Iterable[str], available: Iterable[str]) -> tuple[str, str] | None:
    """The one change of prefix (old, new) that turns every name into an available one, or None."""
    names, available = list(names), set(available)
    first = names[0].split(".")
    candidates: dict[tuple[str, str], int] = {}
    for other in available:
        parts = other.split(".")
        common = 0
        while common < min(len(first), len(parts)) and first[-1 - common] == parts[-1 - common]:
            common += 1
        if common:
            old, new = ".".join(first[: len(first) - common]), ".".join(parts[: len(parts) - common])
            candidates[(old + "." if old else "", new + "." if new else "")] = common
    fitting = []
    for old, new in sorted(candidates, key=lambda c: (-candidates[c], c)):
        turned = [new + n[len(old) :] if n.startswith(old) else None for n in names]
        if None not in turned and available.issuperset(turned) and len(set(turned)) == len(names):  # type: ignore[arg-type]
            fitting.append((old, new))
    if len(fitting) > 1 and candidates[fitting[0]] == candidates[fitting[1]]:
        return None  # two places fit as well: no guessing
    return fitting[0] if fitting else None


# --- writing


def write_adapter(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    extra: Mapping[str, Any],
    encoder: Mapping[str, torch.Tensor],
) -> None:
    """Write the weights, checked and read back, and the extra file; the configuration is written by the caller, last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS_NAME, state, {})
    (folder / BIN_NAME).unlink(missing_ok=True)  # an older file beside it would be another adapter
    if encoder:
        write_weights(folder / ENCODER_NAME, encoder, {})
    else:
        (folder / ENCODER_NAME).unlink(missing_ok=True)
    text = json.dumps(extra, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / EXTRA_NAME, lambda path: path.write_text(text, encoding="utf-8"))
