"""What vLLM would refuse of a run, and the command that serves runs with it.

vLLM serves many LoRA adapters on one base, on GPUs, for scale. It reads PEFT's folders, but not all that they may hold: part
of it is refused at load, and part (other embeddings, per-layer scales) is passed over by some versions without a word, which
would answer otherwise than the run. Both are told here beforehand, with what to do instead. Nothing of vLLM is imported.

Sources: "LoRA Adapters" (docs.vllm.ai, features/lora), "vllm.lora.peft_helper" and "vllm.config.lora" (API reference, stable
and latest), the column LoRA of "Supported Models", and vllm-project/vllm#9280, #12075, #25807 and #53555.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import CheckpointError, ConfigError, Problems, shortened

__all__ = ["RANKS", "command", "refusals"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes

_MERGED = "afina export RUN --format merged, and serve that folder as a model of its own"
_OURS = "afina serve RUN"
_WRITES = "CAUSAL_LM"
# Architectures without a mark in the column LoRA.
_WITHOUT_LORA = frozenset(
    {"arctic", "bloom", "dbrx", "falcon", "gemma3n", "gpt2", "gpt_neox", "gptj", "mpt", "olmoe", "orion"}
)
_PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga", "true", "false"})  # leave the base as it is
_LORA = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)(\.weight)?$")


def refusals(run_folder: Path) -> list[str]:
    """One sentence for each thing of a run that vLLM refuses or would leave out, with what to do; empty where there is none.

    Raises CheckpointError where the folder holds no adapter.
    """
    config, extra, tensors = _read(run_folder / "adapter")
    kind = str(config.get("peft_type") or "none")
    task, found = config.get("task_type"), list[str]()
    if kind != "LORA":
        cure = _OURS if _is_prompt(kind) else f"{_MERGED}; or {_OURS}"
        return [f"peft_type is {kind}, and vLLM serves LoRA alone: {cure}"]
    if task != _WRITES:
        found.append(f"{_of_task(task)}: {_OURS}")
    model_type = (extra.get("base") or {}).get("text_type") or (extra.get("base") or {}).get("model_type")
    if task == _WRITES and model_type in _WITHOUT_LORA:
        found.append(f"vLLM has no LoRA for bases of type {model_type}: {_MERGED}; or {_OURS}")
    found += _of_config(config, task)
    found += _of_tensors(config, extra, tensors)
    return found


def _is_prompt(kind: str) -> bool:
    return kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")


def _of_task(task: Any) -> str:
    said = {
        "SEQ_CLS": "it classifies texts, and its head is part of the adapter; vLLM takes heads (classifier, score) since "
        "its pull request 53555 of August 2026, of some architectures",
        "TOKEN_CLS": "it tags words, which vLLM does not do with LoRA",
        "QUESTION_ANS": "it marks spans, which vLLM does not do",
        "SEQ_2_SEQ_LM": "it has an encoder and a decoder, and vLLM has no LoRA for these",
        "FEATURE_EXTRACTION": "it makes vectors, which vLLM would pool in its own way",
    }
    return said.get(task, f"its task type is {task}, and vLLM's LoRA is for models that write ({_WRITES})")


def _of_config(config: Mapping[str, Any], task: Any) -> list[str]:
    """What `adapter_config.json` says that vLLM does not do."""
    found = []
    ranks = [int(config.get("r") or 0), *(int(r) for r in (config.get("rank_pattern") or {}).values())]
    if config.get("use_dora"):
        found.append(f"use_dora=true: vLLM has no DoRA: {_MERGED}")
    if config.get("bias") not in (None, "none"):
        found.append(f"bias={config['bias']!r}: vLLM takes no trained biases: train with bias: none, or {_MERGED}")
    if config.get("lora_bias"):
        found.append(f"lora_bias=true: vLLM takes no biases of LoRA's own: train without, or {_MERGED}")
    whole = config.get("modules_to_save") or []
    if whole and not (task == "SEQ_CLS" and set(whole) <= {"classifier", "score"}):
        found.append(f"modules_to_save={whole}: vLLM takes no modules trained whole: {_MERGED}")
    if max(ranks) > RANKS[-1]:
        found.append(f"the rank is {max(ranks)}; vLLM takes {RANKS[-1]} at most (--max-lora-rank): {_MERGED}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        found.append(
            "rank_pattern or alpha_pattern: most versions of vLLM scale all layers alike, so some would act too strongly or "
            f"too weakly and nothing would be said: train with one rank and alpha, or {_MERGED}"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in _PLAIN_STARTS:
        found.append(f"init_lora_weights={start!r} changes the base, and vLLM would take the unchanged one: {_MERGED}")
    if config.get("trainable_token_indices"):
        found.append(f"trainable_token_indices: vLLM leaves trained tokens out or refuses them: {_MERGED}")
    if config.get("target_parameters"):
        found.append(f"target_parameters: vLLM reads LoRA on fused experts in a form of its own: {_MERGED}")
    return found


def _of_tensors(config: Mapping[str, Any], extra: Mapping[str, Any], tensors: Mapping[str, list[int]]) -> list[str]:
    """What the file of weights holds that vLLM does not read."""
    found, known = [], set(config.get("modules_to_save") or ())
    others = {}
    for name, shape in tensors.items():
        place = name.removeprefix("base_model.model.").rpartition(".")[0]
        if not _LORA.search(name) and ".lora_magnitude_vector" not in name and not known & set(place.split(".")):
            others[name] = shape
    if tables := [name for name in others if re.search(r"(embed|wte|lm_head)", name)]:
        found.append(
            f"the adapter holds embeddings ({shortened(tables, 2)}), as runs with new tokens do; vLLM passes them over and "
            f"would know none of the new tokens: {_MERGED}"
        )
    rest = [name for name in others if name not in tables]
    if rest and config.get("bias") in (None, "none") and not config.get("lora_bias"):
        found.append(f"the adapter holds what is no LoRA ({shortened(rest, 3)}): {_MERGED}")
    if wide := [name for name, shape in tensors.items() if _LORA.search(name) and len(shape) != 2]:
        found.append(f"it adapts convolutions ({shortened(wide, 2)}); vLLM adapts linear layers and embeddings: {_MERGED}")
    return found


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[int]]]:
    """Configuration, afina's own notes, and the shapes of the tensors (read from the file's header alone)."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if missing := [path.name for path in (config, weights) if not path.is_file()]:
        raise CheckpointError(f"{folder} lacks {' and '.join(missing)}; give the folder that was --output of `afina train`")
    extra = folder / "afina.json"
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    noted = json.loads(extra.read_text(encoding="utf-8")) if extra.is_file() else {}
    return json.loads(config.read_text(encoding="utf-8")), noted, shapes


def command(runs: Mapping[str, Path], host: str = "127.0.0.1", port: int = 8000) -> str:
    """The command line that serves runs, by name, on vLLM.

    Raises ConfigError with all that stands against it: what `refusals` says of each, several bases, several templates.
    """
    problems = Problems("vLLM")
    bases, ranks, templates, new = dict[str, list[str]](), list[int](), dict[str, Path](), list[str]()
    for name, folder in runs.items():
        problems.found += [f"{name}: {line}" for line in refusals(folder)]
        config, _, _ = _read(folder / "adapter")
        bases.setdefault(str(config.get("base_model_name_or_path")), []).append(name)
        ranks.append(int(config.get("r") or 0))
        template = folder / "adapter" / "chat_template.jinja"
        if template.is_file():
            templates.setdefault(template.read_text(encoding="utf-8"), template)
        if "=" in name or not name.strip():
            new.append(name)
    if new:
        problems.add(f"{', '.join(map(repr, new))}: a name may hold no = and must not be empty")
    if len(bases) > 1:
        named = "; ".join(f"{', '.join(names)} on {base}" for base, names in bases.items())
        problems.add(f"one vLLM serves one base; these are on {len(bases)}: {named}. Start one for each")
    if len(templates) > 1:
        said = "the runs put questions in different ways (chat_template.jinja), and vLLM knows one for all. Start several"
        problems.add(said)
    problems.raise_as(ConfigError)
    rank = next(known for known in RANKS if known >= max(ranks))
    words = ["vllm", "serve", next(iter(bases)), "--enable-lora", "--lora-modules"]
    words += [f"{name}={(folder / 'adapter').resolve()}" for name, folder in runs.items()]
    words += ["--max-lora-rank", str(rank), "--max-loras", str(len(runs)), "--host", host, "--port", str(port)]
    for template in templates.values():
        words += ["--chat-template", str(template.resolve())]
    return shlex.join(words)
