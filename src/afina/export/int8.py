"""Weights of eight bits, for the CPU.

Every linear layer and every embedding table keeps whole numbers from -127 to 127 and one scale for each output or row:
`weight` (int8) and `weight_scale` (float32) in one safetensors file, `weight * weight_scale[:, None]` being the weight.
Inputs of linear layers are rounded to eight bits as they come, with one scale a batch, and multiplied as whole numbers
(torch's quantised linear); sums, norms, attention and layers of a few outputs stay float32. A table and a head
that are tied share their numbers, in the file too.

Where eight bits could overflow (CPUs without VNNI) inputs are rounded to seven, which doubles their error and is told.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from afina.core.layers import LayerView, view_of
from afina.errors import CheckpointError, ConfigError, TargetError, shortened
from afina.export.format import Format, Settings, Source, model_class
from afina.export.merged import read_merged, write_shards
from afina.memory.loading import READ_AS_TABLES
from afina.tasks.task import Task

__all__ = ["Int8", "Int8Embedding", "Int8Linear", "load_int8", "quantised", "rounded"]

FEW = 16  # a linear layer of fewer outputs stays as it is: it costs nothing, and its rounding is not averaged out
TABLE = "int8.json"  # which modules are stored so
_TOLERANCE = 0.03  # of probabilities, in the mean over the golden prompts


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, n]` to int8 `[rows, n]` and scales `[rows]`, float32; the largest value of a row becomes 127."""
    scale = weight.abs().amax(dim=1).float().clamp_min(1e-12) / 127
    return (weight.float() / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """`x @ weight.T + bias` of int8 weights `[out, in]`; x is rounded as it comes. Forward only."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.nf = self.out_features
        self.weight = torch.empty(0, dtype=torch.int8)  # models look at its type; the numbers lie packed, below
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = _engine()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*", category=UserWarning)
                zeros = torch.zeros(len(scale), dtype=torch.long)
                made = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(made, None if bias is None else bias.float())
        finally:
            torch.backends.quantized.engine = engine
        self.seven = seven_bits()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        y = torch.ops.quantized.linear_dynamic(x.float().contiguous(), self.packed, reduce_range=self.seven)
        return y.to(x.dtype)  # type: ignore[no-any-return]


class Int8Embedding(nn.Module):
    """Rows of an int8 table `[rows, width]`."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, like: nn.Module):
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = getattr(like, "padding_idx", None)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.embed_scale = getattr(like, "embed_scale", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `[...]` to float32 `[..., width]`."""
        rows = F.embedding(ids, self.weight).float() * F.embedding(ids, self.weight_scale[:, None])
        return rows if self.embed_scale is None else rows * self.embed_scale


def seven_bits() -> bool:
    """Whether inputs are rounded to seven bits here."""
    return not torch.cpu._is_vnni_supported()


def _engine() -> str:
    known = torch.backends.quantized.supported_engines
    fastest = ("x86", "fbgemm", "onednn", "qnnpack") if seven_bits() else ("onednn", "x86", "fbgemm", "qnnpack")
    found = next((name for name in fastest if name in known), None)
    if found is None:
        raise ConfigError("--format int8: this torch has no quantised arithmetic for the CPU; take --format onnx-int8")
    return found


def _view(path: str, module: nn.Module) -> LayerView | None:
    """The module as a linear layer or a table that can be stored so, or None."""
    if path.rpartition(".")[2] in READ_AS_TABLES:
        return None
    try:
        view = view_of(module)
    except TargetError:  # an embedding with a forward of its own
        return None
    if view.kind == "embedding":
        return view
    return view if view.kind == "linear" and view.out_features >= FEW else None


def quantised(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a model, layers and tables as int8 with scales; tied ones once. Nothing is changed in it."""
    targets = set(getattr(model, "all_tied_weights_keys", None) or ())
    done: set[int] = set()
    for path, module in model.named_modules():
        view = _view(path, module)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            key = f"{path}.{name}".lstrip(".")
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            if id(tensor) in done and key in targets:
                continue
            done.add(id(tensor))
            if view is None or name != "weight":
                yield {key: tensor.detach()}
                continue
            weight = view.weight().detach()
            values, scale = rounded(weight.T if view.kind == "embedding" else weight)
            yield {key: values, f"{key}_scale": scale}


def load_int8(folder: Path | str) -> Any:
    """The model of a folder that `afina export --format int8` wrote, for the CPU. Raises CheckpointError."""
    from safetensors import safe_open
    from transformers import AutoConfig, GenerationConfig
    from transformers.initialization import no_init_weights

    folder = Path(folder)
    made = model_class(folder)
    with no_init_weights():
        model = made(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    modules = json.loads((folder / TABLE).read_text(encoding="utf-8"))["modules"]
    held: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            held |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
    used: set[str] = set()
    for path, stored in modules.items():
        parent, _, leaf = path.rpartition(".")
        old = model.get_submodule(path)
        keys = [f"{stored}.weight", f"{stored}.weight_scale"]
        if missing := [key for key in keys if key not in held]:
            raise CheckpointError(f"{folder} lacks {shortened(missing)}")
        weight, scale = (held[key] for key in keys)
        bias = held.get(f"{path}.bias")
        view = view_of(old)
        table = view.kind == "embedding"
        shape = (view.in_features, view.out_features) if table else view.weight_shape
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"{folder}: {keys[0]} is {list(weight.shape)}, its configuration says {list(shape)}")
        new = Int8Embedding(weight, scale, old) if table else Int8Linear(weight, scale, bias)
        setattr(model.get_submodule(parent), leaf, new)
        used |= {*keys, f"{path}.bias"}
    _fill(model, {key: tensor for key, tensor in held.items() if key not in used}, folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval().requires_grad_(False)


def _fill(model: Any, rest: dict[str, torch.Tensor], folder: Path) -> None:
    """What is not int8, strictly."""
    found = model.load_state_dict(rest, strict=False)
    targets = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [k for k in found.missing_keys if k not in targets and not k.endswith((".weight_scale",))
               and not isinstance(model.get_submodule(k.rpartition(".")[0]), Int8Embedding)]  # fmt: skip
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"{folder} does not fit its configuration: missing {shortened(missing) or 'nothing'}, unexpected "
            f"{shortened(found.unexpected_keys) or 'nothing'}"
        )


class Int8(Format):
    """Weights and inputs of eight bits, for transformers on the CPU."""

    name = "int8"
    title = "a quarter of the size and faster on a CPU, for afina and transformers"
    lossy = True
    timed = True

    def check(self, task: Task, config: Any, settings: Settings) -> None:
        """Whatever has linear layers, on a torch that can multiply whole numbers."""
        _engine()

    def write(self, source: Source, folder: Path) -> None:
        """See `quantised`; configuration and tokenizer are those of the merged model."""
        model = read_merged(source.folder)
        places: dict[int, str] = {}
        modules = {}
        for path, module in model.named_modules():
            if _view(path, module) is not None:
                modules[path] = places.setdefault(id(module._parameters["weight"]), path)
        if not modules:
            raise ConfigError(f"--format int8: {type(model).__name__} has no linear layer or table that could be stored so")
        write_shards(folder, quantised(model))
        content = {"bits": 8, "modules": modules}
        (folder / TABLE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        copy_rest(source.folder, folder)
        kept = sum(p.numel() for p in model.parameters())
        whole = sum(m._parameters["weight"].numel() for p, m in model.named_modules() if modules.get(p) == p)
        source.notes.append(f"{whole / kept:.1%} of the weights are int8, one scale for each output or row")
        if seven_bits():
            source.notes.append(
                "this processor lacks VNNI, so inputs are rounded to 7 bits here, with about twice the error of 8; on one "
                "that has it, and in --format onnx-int8, they have 8"
            )

    def load(self, folder: Path, task: Task) -> Any:
        """By `load_int8`."""
        return load_int8(folder)

    def tolerance(self, folder: Path, settings: Settings) -> float:
        """In the mean."""
        return _TOLERANCE

    def cure(self) -> str:
        """Of inputs with seven bits."""
        said = "This processor lacks VNNI, so inputs have 7 bits; take --format onnx-int8, where they have 8."
        return said if seven_bits() else ""


def copy_rest(source: Path, folder: Path) -> None:
    """All of a merged model but its weights."""
    import shutil

    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors" or path.name.endswith(".index.json"):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copy2(path, folder / path.name)
