"""The names of layers in Kohya's files, and reading and writing them.

A name is the path with underscores for dots, below `lora_unet` and `lora_te`; where the programs that made the format use
other names for layers (SDXL, SD3, Flux), theirs are written. Some of their layers are several of diffusers' in one: the
factors of queries, keys and values become one pair, with a block of its own for each, and are taken apart again exactly.
Underscores cannot be told from dots, so a file is read for a pipeline whose layers are known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from afina.diffusion.factors import Factors, portable, refuse_left
from afina.diffusion.families import Family
from afina.errors import ConfigError, shortened

__all__ = ["from_kohya", "kohya_names", "to_kohya"]

Shapes = Mapping[str, tuple[int, ...]]
_TEXTS = {
    "sd": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"},
    "flux": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_XL = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
       "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
       "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
_SD3 = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2", "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
_SD3_FUSED = {"x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
              "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
              "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v")}  # fmt: skip
_FLUX = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2", "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}  # fmt: skip
_FLUX_FUSED = {"img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
               "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")}  # fmt: skip
_FLUX_SINGLE = {"proj_out": "linear2", "norm.linear": "modulation.lin"}
_FLUX_SINGLE_FUSED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
_FLUX_TOP = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}  # fmt: skip


def kohya_names(family: Family, shapes: Shapes, layers_per_block: int) -> dict[str, list[str]]:
    """Name in a file -> the layers of the pipeline it is for, several where they are one there."""
    made: dict[str, list[str]] = {}
    for path in shapes:
        part, _, inside = path.partition(".")
        if part in _TEXTS[family.name]:
            made[f"{_TEXTS[family.name][part]}_{_flat(portable(path).partition('.')[2])}"] = [path]
        elif part == family.core and (name := _core_name(family.name, inside, shapes, layers_per_block)):
            made.setdefault(f"lora_unet_{_flat(name)}", []).append(path)
    for paths in made.values():
        paths.sort(key=_place)
    return made


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _place(path: str) -> int:
    """Place of a layer among those that are one in Kohya's files."""
    order = ("_q", "_k", "_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")
    return next((i for i, end in enumerate(order) if path.endswith(end)), 0)


def _core_name(family: str, inside: str, shapes: Shapes, layers: int) -> str | None:
    if family == "sd":
        return inside
    if family == "sdxl":
        return _XL.get(inside) or _block_of_unet(inside, shapes, layers)
    if family == "sd3":
        found = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", inside)
        name = found and _in_block(found[2], _SD3, _SD3_FUSED)
        return f"joint_blocks.{found[1]}.{name}" if found and name else None
    if inside in _FLUX_TOP:
        return _FLUX_TOP[inside]
    found = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", inside)
    if not found:
        return None
    name = _in_block(found[3], _FLUX_SINGLE, _FLUX_SINGLE_FUSED) if found[1] else _in_block(found[3], _FLUX, _FLUX_FUSED)
    return f"{'single' if found[1] else 'double'}_blocks.{found[2]}.{name}" if name else None


def _in_block(inside: str, plain: Mapping[str, str], fused: Mapping[str, tuple[str, ...]]) -> str | None:
    return plain.get(inside) or next((name for name, parts in fused.items() if inside in parts), None)


def _block_of_unet(inside: str, shapes: Shapes, layers: int) -> str | None:
    """A layer of SDXL's blocks by the numbers that they had in the first program for it."""
    found = re.fullmatch(
        r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", inside
    )
    if not found:
        return None
    where, block, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    rest = _RESNET.get(rest, rest) if kind == "resnets" else rest
    if where == "mid":
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    each = layers + 1
    if kind == "downsamplers":
        return f"input_blocks.{each * (block + 1)}.0.op"
    if kind == "upsamplers":
        attended = any(path.startswith(f"unet.up_blocks.{block}.attentions.") for path in shapes)
        return f"output_blocks.{each * block + layers}.{1 + attended}.conv"
    place = f"input_blocks.{each * block + number + 1}" if where == "down" else f"output_blocks.{each * block + number}"
    return f"{place}.{int(kind == 'attentions')}.{rest}"


# --- writing


def to_kohya(
    factors: Mapping[str, Factors], family: Family, shapes: Shapes, layers_per_block: int
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises ConfigError for layers that the format has no name for."""
    made: dict[str, torch.Tensor] = {}
    left = dict(factors)
    for name, paths in kohya_names(family, shapes, layers_per_block).items():
        if not any(path in factors for path in paths):
            continue
        own = factors[paths[0]] if len(paths) == 1 else _joined(name, [factors.get(p) for p in paths], paths, shapes)
        made |= {
            f"{name}.lora_down.weight": own.down,
            f"{name}.lora_up.weight": own.up,
            f"{name}.alpha": torch.tensor(own.alpha),
        }
        for path in paths:
            left.pop(path, None)
    if left:
        raise ConfigError(
            f"Kohya's format has no name for {shortened(sorted(left))}; export as diffusers, or adapt other layers"
        )
    first = next(iter(factors.values()))
    return made, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": f"{first.alpha:g}",
    }


def _joined(name: str, parts: list[Factors | None], paths: list[str], shapes: Shapes) -> Factors:
    """One pair for several layers with one input: each with rows and columns of its own, zeros where one is not adapted."""
    there = [part for part in parts if part is not None]
    rank, alpha = there[0].rank, there[0].alpha
    if any((part.rank, part.alpha) != (rank, alpha) for part in there):
        raise ConfigError(f"{name} is one layer in Kohya's format, and its parts have ranks or alphas that differ")
    up, down = there[0].up, there[0].down
    rows = [shapes[path][0] for path in paths]
    wide = up.new_zeros(sum(rows), rank * len(paths))
    downs, top = [], 0
    for i, (part, count) in enumerate(zip(parts, rows, strict=True)):
        downs.append(torch.zeros_like(down) if part is None else part.down)
        if part is not None:
            wide[top : top + count, i * rank : (i + 1) * rank] = part.up
        top += count
    return Factors(torch.cat(downs), wide, alpha * len(paths))


# --- reading


def from_kohya(
    state: Mapping[str, torch.Tensor], family: Family, shapes: Shapes, layers_per_block: int
) -> dict[str, Factors]:
    """Factors for the layers of a pipeline. Raises CheckpointError with every key that fits nothing."""
    names = kohya_names(family, shapes, layers_per_block)
    if family.name == "sd":  # some programs call its one text encoder the first
        names |= {f"lora_te1_{n.removeprefix('lora_te_')}": p for n, p in names.items() if n.startswith("lora_te_")}
    if family.name == "sdxl":  # and some keep the names of diffusers
        names |= {f"lora_unet_{_flat(p.partition('.')[2])}": [p] for p in shapes if p.startswith("unet.")}
    made: dict[str, Factors] = {}
    used: set[str] = set()
    for key, down in state.items():
        name, _, leaf = key.partition(".")
        if leaf != "lora_down.weight" or name not in names or f"{name}.lora_up.weight" not in state:
            continue
        alpha = float(state[f"{name}.alpha"]) if f"{name}.alpha" in state else float(down.shape[0])
        own, paths = Factors(down, state[f"{name}.lora_up.weight"], alpha), names[name]
        made |= {paths[0]: own} if len(paths) == 1 else _parted(own, paths, shapes)
        used |= {key, f"{name}.lora_up.weight", f"{name}.alpha"}
    refuse_left(sorted(state.keys() - used), "Kohya")
    return made


def _parted(own: Factors, paths: list[str], shapes: Shapes) -> dict[str, Factors]:
    """One pair as those of several layers: by blocks where all else is zero, else each with the whole first factor."""
    rows, count = [shapes[path][0] for path in paths], len(paths)
    ups = own.up.split(rows)
    if own.rank % count == 0:
        rank = own.rank // count
        blocks: list[Any] = [up.split(rank, dim=1) for up in ups]
        if not any(bool(block.any()) for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j):
            downs = own.down.split(rank)
            parts = {
                p: Factors(downs[i].contiguous(), blocks[i][i].contiguous(), own.alpha / count) for i, p in enumerate(paths)
            }
            return {path: part for path, part in parts.items() if bool(part.up.any()) or bool(part.down.any())}
    return {path: Factors(own.down.clone(), up.contiguous(), own.alpha) for path, up in zip(paths, ups, strict=True)}
