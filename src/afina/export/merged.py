"""The adapter merged into the weights of the base: a model for transformers, without afina.

Weights are never all in memory. The base is loaded in the type its checkpoint has, which leaves safetensors mapped and
unread; the model is walked through once, each layer's adapters are merged when it is reached, its tensors go into the shard
that is being filled, and are let go with it. What a walk needs is one shard, one layer in float32, and the tied embeddings,
which are merged first because only then it is known whether both sides are still equal (T6).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.core.adapted import AdaptedLayer
from afina.core.codecs.written_out import is_quantised
from afina.core.dequantise import dequantised
from afina.core.injection import AdapterSet
from afina.core.ties import tied_groups
from afina.errors import CheckpointError, MergeError, shortened
from afina.export.format import Format, Settings, Source, model_class
from afina.memory.storage import FLOATS
from afina.tasks.task import Task

__all__ = ["Merged", "merged_tensors", "write_merged", "write_shards"]

SHARD = 1 << 30  # bytes
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # of probabilities, by the weights' type


def merged_tensors(adapters: AdapterSet) -> Iterator[Mapping[str, torch.Tensor]]:
    """The model's tensors with the active adapters merged, a part at a time, named as its checkpoint names them.

    Quantised layers become the floating-point values that they stand for before anything is merged into them. The model
    cannot be used afterwards. Raises MergeError where an adapter cannot be merged.
    """
    model: Any = adapters.model
    names = adapters.active
    adapters.unmerge()
    adapters.check_mergeable(names)
    ties = tied_groups(model)
    tied = [slot.rpartition(".")[0] for group in ties.groups for slot in group]
    for key, layer in adapters.layers.items():
        if any(path == key or path.startswith(f"{key}.") for path in tied):
            layer.merge(names, keep=False)
    ties.mend(model, untie=True)
    floats = model.dtype if model.dtype.is_floating_point else torch.float32
    targets = set(getattr(model, "all_tied_weights_keys", None) or ())
    still = {slot for group in tied_groups(model).groups for slot in group if slot in targets}
    pairs = _walk(model, "", names, floats)
    yield from _renamed(model, (pair for pair in pairs if pair[0] not in still))


def _inner(module: nn.Module) -> nn.Module:
    while isinstance(module, AdaptedLayer):
        module = module.base_layer
    return module


def _walk(module: nn.Module, prefix: str, names: tuple[str, ...], floats: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a module, its adapters merged as it is reached; given parameters are let go."""
    wrappers: list[AdaptedLayer] = []
    while isinstance(module, AdaptedLayer):
        wrappers.append(module)
        module = module.base_layer
    if any(is_quantised(_inner(child)) for child in module.children()):
        dequantised(module, floats)
    for wrapper in reversed(wrappers):
        wrapper.merge(names, keep=False)
        if wrapper is wrappers[-1]:
            module = wrapper.base_layer  # a module trained whole stands in for it now
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            yield f"{prefix}{name}", parameter.detach()
            module._parameters[name] = None
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield f"{prefix}{name}", buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", names, floats)


def _renamed(model: Any, pairs: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors under the names that a checkpoint of this architecture has, a block at a time: where transformers holds
    several tensors of a checkpoint as one, they all belong to one block."""
    from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion

    # The base's checkpoint may lack the prefix that a model with a head has; with the head in the file it is wanted.
    if getattr(model, "hf_quantizer", None) is not None:  # what turns floating point into quantised tensors is no name
        from transformers.conversion_mapping import get_model_conversion_mapping

        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    kept = [c for c in getattr(model, "_weight_conversions", None) or () if not isinstance(c, PrefixChange)]
    model._weight_conversions = kept or None
    whole = any(isinstance(c, WeightConverter) for c in kept)
    waiting: dict[str, torch.Tensor] = {}
    block = ""
    for name, tensor in pairs:
        numbered = re.match(r"(.*?\.\d+\.)", name) if whole else None
        here = numbered[1] if numbered else name
        if waiting and here != block:
            yield revert_weight_conversion(model, waiting) if kept else waiting
            waiting = {}
        block = here
        waiting[name] = tensor
        del tensor
    if waiting:
        yield revert_weight_conversion(model, waiting) if kept else waiting


def write_shards(
    folder: Path, parts: Iterator[Mapping[str, torch.Tensor]], *, dtype: torch.dtype | None = None, shard: int = SHARD
) -> list[str]:
    """Tensors to safetensors files of at most `shard` bytes, or of one tensor that is larger; returns their names.

    Floating-point tensors become `dtype`. Raises CheckpointError for values that are missing or not finite.
    """
    from safetensors.torch import save_file

    places: dict[str, int] = {}
    files: list[Path] = []
    waiting: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        if waiting:
            files.append(folder / f"part-{len(files)}")
            save_file(waiting, files[-1], metadata={"format": "pt"})
            files[-1].chmod(0o644)
            waiting.clear()
            size = 0

    for part in parts:
        for name, tensor in part.items():
            if name in places:
                raise CheckpointError(f"{name} came twice; nothing was exported")
            if tensor.is_meta:
                raise CheckpointError(f"{name} has no values (it is on the meta device); nothing was exported")
            if tensor.is_floating_point() and dtype is not None:
                tensor = tensor.to(dtype)
            if tensor.is_floating_point() and not _finite(tensor):
                raise CheckpointError(f"{name} holds values that are not finite; nothing was exported")
            bytes_ = tensor.numel() * tensor.element_size()
            if waiting and size + bytes_ > shard:
                flush()
            waiting[name] = tensor.to("cpu").contiguous()
            places[name] = len(files)
            size, total = size + bytes_, total + bytes_
            del tensor
        del part
    flush()
    if len(files) == 1:
        files[0].rename(folder / WEIGHTS)
        return sorted(places)
    named = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file, name in zip(files, named, strict=True):
        file.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {key: named[i] for key, i in sorted(places.items())}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sorted(places)


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are numbers, looked at a stretch at a time: of a mapped tensor nothing is copied."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(1 << 22))


def write_merged(model: Any, task: Task, folder: Path, *, dtype: torch.dtype | None = None, shard: int = SHARD) -> None:
    """A folder that transformers reads: weights, configuration, tokenizer with chat template or what else makes the input,
    stop tokens, pooling.

    `model` is a PeftModel whose base lies on the CPU in a floating-point type; it cannot be used afterwards.
    """
    base = model.get_base_model()
    stops = task.ends(base) if hasattr(task, "ends") else []
    write_shards(folder, merged_tensors(model.adapters), dtype=dtype, shard=shard)
    config = base.config
    config.architectures = [type(base).__name__]
    config.dtype = dtype or next((d for d in (config.dtype, base.dtype) if isinstance(d, torch.dtype)), torch.float32)
    for key in ("quantization_config", "_name_or_path"):
        config.__dict__.pop(key, None)
    config.save_pretrained(folder)
    if base.can_generate():
        settings = base.generation_config
        settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None
        settings.pad_token_id = task.tokenizer.pad_token_id
        settings._from_model_config = False
        settings.save_pretrained(folder)
    task.processor.save_pretrained(folder)
    if hasattr(task, "pooling"):
        _write_pooling(folder, task.pooling, config.hidden_size, task.tokenizer.model_max_length)


def _write_pooling(folder: Path, pooling: str, width: int, length: int) -> None:
    """How vectors are made, in the layout of sentence-transformers."""
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": "" if not i else f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    modes = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "max": "max_tokens"}
    said = {"word_embedding_dimension": width}
    said |= {f"pooling_mode_{mode}": name == pooling for name, mode in modes.items()}
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", said),
        ("sentence_bert_config.json", {"max_seq_length": length if length < 1_000_000 else None}),
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "2_Normalize").mkdir(exist_ok=True)


def read_merged(folder: Path, **settings: Any) -> Any:
    """The model, by transformers alone; `settings` are those of `from_pretrained`.

    Raises CheckpointError where a tensor is missing, unexpected or misshapen.
    """
    model, info = model_class(folder).from_pretrained(folder, output_loading_info=True, dtype="auto", **settings)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = [f"{kind.replace('_', ' ')}: {shortened(info[kind])}" for kind in kinds if info[kind]]
    if wrong:
        raise CheckpointError(f"{folder} was read by transformers, but {'; '.join(wrong)}")
    return model.eval()


class Merged(Format):
    """A model of transformers."""

    name = "merged"
    title = "one model with the adapter in its weights, for transformers, vLLM and whatever else reads such folders"

    def check(self, task: Task, config: Any, settings: Settings) -> None:
        """Every model that was loaded can be written."""

    def write(self, source: Source, folder: Path) -> None:
        """The merged model is what everything begins with: it is moved here."""
        for path in sorted(source.folder.iterdir()):
            path.rename(folder / path.name)

    def load(self, folder: Path, task: Task) -> Any:
        """By the class of transformers that the configuration names."""
        return read_merged(folder)

    def tolerance(self, folder: Path, settings: Settings) -> float:
        """Rounding of the sums in the weights' type."""
        from transformers import AutoConfig

        dtype = AutoConfig.from_pretrained(folder).dtype
        return _TOLERANCE.get(dtype, _TOLERANCE[torch.float32])


def asked_dtype(name: str) -> torch.dtype | None:
    """The type that --dtype means; None: that of the checkpoint."""
    if name == "auto":
        return None
    if name not in FLOATS:
        raise MergeError(f"--dtype {name}: expected auto, {', '.join(FLOATS)}")
    return FLOATS[name]
