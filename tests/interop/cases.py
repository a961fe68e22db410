"""What is compared with PEFT: one line per method, model and set of options, and how the two sides are made."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch

import afina

from .models import TASK, batch, build


@dataclass(frozen=True)
class Case:
    """One method on one model."""

    model: str
    config: str = "LoraConfig"
    options: dict[str, Any] = field(default_factory=dict)
    task: bool = True  # hand the model's task type over
    same_files: bool = True  # the same options lead to the same keys
    told: str = ""  # a piece of what PEFT may warn about when it reads afina's folder
    note: str = ""

    def __str__(self) -> str:
        shown = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.model}-{self.config.removesuffix('Config')}-{self.note or shown}"

    def make_config(self, package: Any) -> Any:
        options = copy.deepcopy(self.options)
        if self.task and self.model in TASK:
            options["task_type"] = TASK[self.model]
        return getattr(package, self.config)(**options)


@contextmanager
def peft_warnings() -> Iterator[list[str]]:
    """Collects what PEFT warns about, which is not ours to answer for at creation."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        messages: list[str] = []
        yield messages
        messages += [str(w.message) for w in caught]


def theirs(case: Case) -> Any:
    """PEFT's model with random adapter weights."""
    torch.manual_seed(7)
    with peft_warnings():
        model = peft.get_peft_model(build(case.model), case.make_config(peft))
    return shake(model)


def ours(case: Case) -> Any:
    """afina's model with random adapter weights."""
    torch.manual_seed(7)
    return shake(afina.get_peft_model(build(case.model), case.make_config(afina)))


def shake(model: Any) -> Any:
    """Move every trained parameter away from where it starts."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
    return model


def save(model: Any, folder: Path) -> Path:
    with peft_warnings():
        model.save_pretrained(folder)
    return folder


def logits(model: Any, name: str) -> torch.Tensor:
    """The output on `batch(name)`, zero where the input is padding: nothing is meant to depend on that."""
    model.eval()
    data = batch(name)
    with torch.no_grad(), peft_warnings():
        out = model(**data)
    found = out["logits"] if "logits" in out else torch.stack([out["start_logits"], out["end_logits"]], -1)
    mask = data.get("attention_mask")
    if (
        mask is None
        or found.dim() < 3
        or ("labels" in data and data["labels"].dim() == 2 and data["labels"].shape != mask.shape)
    ):
        return found
    front = torch.ones(len(mask), found.shape[1] - mask.shape[1])
    return found * torch.cat([front, mask], 1).unsqueeze(-1)


def loss_of(model: Any, name: str) -> torch.Tensor:
    with peft_warnings():
        return model(**batch(name))["loss"]


def stored(package: Any, model: Any) -> dict[str, torch.Tensor]:
    with peft_warnings():
        return package.get_peft_model_state_dict(model)


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what PEFT stores beyond the adapter: a head's bias twice more, an embedding nobody changed."""
    beyond = (".modules_to_save.", ".original_module.", ".base_layer.weight")
    return {key: tensor for key, tensor in state.items() if not any(b in key for b in beyond)}


def gradients(package: Any, model: Any) -> dict[str, torch.Tensor]:
    """Gradients by checkpoint key, after a backward pass."""
    by_place = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    found = {}
    for key, tensor in plain(stored(package, model)).items():
        parameter = by_place.get(tensor.data_ptr())
        if parameter is not None and parameter.shape == tensor.shape:
            found[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest expected value."""
    assert found.shape == expected.shape, f"{what}: {list(found.shape)} instead of {list(expected.shape)}"
    size = max(float(expected.abs().max()), 1.0 if what == "output" else 1e-2)
    error = float((found - expected).abs().max())
    assert error <= tolerance * size, f"{what}: differs by {error:.2g} where values reach {size:.2g}"


QV = {"bert": ["query", "value"], "gpt2": ["c_attn"], "t5": ["q", "v"]}
MLP = {"llama": ["gate_proj", "down_proj"]}
ALL_TEXT = ["bert", "gpt2", "opt", "llama", "t5", "bart"]

LORA = [
    *[Case(m, note="default") for m in [*ALL_TEXT, "bert-tok", "bert-qa", "gpt2-cls", "llama-cls"]],
    Case("vit", options={"target_modules": ["q_proj", "v_proj"]}),
    Case("vit", options={"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    Case("whisper", options={"target_modules": ["q_proj", "v_proj"]}),
    *[Case(m, options={"r": 5, "lora_alpha": 11, "target_modules": "all-linear"}) for m in ("bert", "gpt2", "llama", "t5")],
    *[Case(m, options={"r": 5, "lora_alpha": 11, "use_rslora": True}) for m in ("gpt2", "llama")],
    *[Case(m, options={"init_lora_weights": i}) for m in ("bert", "gpt2") for i in ("gaussian", False)],
    *[Case(m, options={"lora_bias": True}) for m in ("bert", "gpt2", "opt")],
    *[Case(m, options={"bias": b}) for m in ("bert", "gpt2", "opt", "bart") for b in ("all", "lora_only")],
    Case("bert", options={"bias": "all", "lora_bias": True}),
    Case("conv", options={"target_modules": ["conv1", "head"], "bias": "all"}),
    Case(
        "llama",
        options={
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 5},
            "alpha_pattern": {r"layers\.0\..*": 17, "v_proj": 2},
        },
        note="patterns",
    ),
    Case("bert", options={"rank_pattern": {"query": 3}, "alpha_pattern": {"value": 21}}),
    Case("bert", options={"modules_to_save": ["pooler"]}),
    Case("gpt2", options={"modules_to_save": ["ln_f", "wpe"]}),
    Case("llama", options={"modules_to_save": ["lm_head"]}),
    Case("llama", options={"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    Case("t5", options={"target_modules": ["q", "wo"], "layers_to_transform": [0], "layers_pattern": "block"}),
    Case("opt", options={"target_modules": r".*\.layers\.[1]\.(fc1|self_attn\.k_proj)"}, note="regex"),
    Case("gpt2", options={"target_modules": ["c_attn", "c_proj"], "exclude_modules": r".*mlp.*"}),
    Case("gpt2", options={"target_modules": ["wpe", "wte", "c_fc"], "r": 3}, note="embedding"),
    Case(
        "bert", options={"target_modules": ["word_embeddings", "token_type_embeddings", "query"], "r": 3}, note="embedding"
    ),
    Case("llama", options={"target_modules": ["embed_tokens", "q_proj"], "r": 3}, note="embedding"),
    Case("conv", options={"target_modules": ["conv1", "conv2", "seq", "head"], "r": 3, "lora_alpha": 7}),
    Case("vit", options={"target_modules": ["projection"], "r": 3}),
    *[
        Case(m, options={"target_parameters": p, "r": 3})
        for m in ("mixtral", "qwen3moe")
        for p in (["mlp.experts.gate_up_proj"], ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], ["gate.weight"])
    ],
    Case("mixtral", options={"target_parameters": ["down_proj"], "target_modules": ["q_proj"], "r": 3}),
    *[Case(m, options={"trainable_token_indices": [3, 17, 5]}) for m in ("bert", "gpt2", "llama", "llama-tied")],
    Case("llama", options={"trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [5]}}),
    Case("llama-tied", options={"trainable_token_indices": {"embed_tokens": [3, 17]}}),
    Case("llama-tied", options={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    Case("llama-tied", options={"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    Case("llama-tied", options={"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    Case("llama-tied", options={"modules_to_save": ["embed_tokens", "lm_head"]}),
    # PEFT ties by name: "wte" is none of the names it knows, and the option stays in the file without having acted
    Case("gpt2", options={"modules_to_save": ["wte"], "ensure_weight_tying": True}, same_files=False),
    Case("gpt2", options={"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    Case("gpt2", options={"target_modules": ["wte"], "ensure_weight_tying": True}, same_files=False),
    Case("llama-tied", options={"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [5]}}),
    Case("llama-tied", options={"trainable_token_indices": {"lm_head": [5]}}),
    Case("llama-tied", options={"trainable_token_indices": [3, 4], "ensure_weight_tying": True}),
    Case("llama-tied", options={"target_modules": ["lm_head", "q_proj"]}),
    Case("llama-tied", options={"target_modules": ["embed_tokens"]}),
    Case("bart", options={"trainable_token_indices": [3, 4]}),
    Case("whisper", options={"target_modules": ["proj_out", "q_proj"]}),
    # PEFT writes what these names have become in the present transformers: parameters of fused experts
    Case("mixtral", options={"target_modules": "all-linear"}, same_files=False),
]
DORA = [
    *[Case(m, options={"use_dora": True}) for m in ALL_TEXT],
    Case("gpt2", options={"use_dora": True, "target_modules": ["wte", "wpe", "c_proj"], "r": 3}),
    Case("conv", options={"use_dora": True, "target_modules": ["conv1", "conv2", "head"], "r": 3}),
    Case("vit", options={"use_dora": True, "target_modules": ["projection", "fc1"], "use_rslora": True}),
    Case("whisper", options={"use_dora": True, "target_modules": ["q_proj"]}),
]
IA3 = [
    *[Case(m, "IA3Config", note="default") for m in ("gpt2", "llama", "t5")],
    # PEFT's table scales queries of OPT, queries and no keys of BART, and also the attention's output of BERT; afina finds
    # keys, values and inner activations, as in the paper, in every architecture
    *[Case(m, "IA3Config", note="default", same_files=False) for m in ("bert", "opt", "bart")],
    *[
        Case(m, "IA3Config", {"target_modules": t, "feedforward_modules": f})
        for m, t, f in (
            ("bert", ["query", "intermediate.dense"], []),
            ("llama", ["q_proj", "down_proj", "up_proj"], ["up_proj"]),
            ("vit", ["k_proj", "fc2"], ["fc2"]),
            ("whisper", ["k_proj", "v_proj", "fc2"], ["fc2"]),
            ("conv", ["conv1", "conv2", "head"], ["conv2"]),
        )
    ],
]
LAYERS = [
    *[Case(m, "LNTuningConfig", note="default") for m in ("gpt2", "llama", "t5")],
    Case("bert", "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    Case("vit", "LNTuningConfig", {"target_modules": ["layernorm_before", "layernorm"]}),
    Case("bart", "LNTuningConfig", {"target_modules": ["self_attn_layer_norm", "layernorm_embedding"]}),
    Case("opt", "LNTuningConfig", {"target_modules": ["final_layer_norm"]}),
    Case("whisper", "LNTuningConfig", {"target_modules": ["final_layer_norm", "layer_norm"]}),
    *[
        Case(m, "TrainableTokensConfig", {"token_indices": [17, 3, 51]})
        for m in ("gpt2", "opt", "llama", "llama-tied", "t5")
    ],
    # PEFT does not save the new head here, so that it comes back random (T5)
    Case("bert", "TrainableTokensConfig", {"token_indices": [3]}, same_files=False, told="['modules_to_save']"),
    Case("llama", "TrainableTokensConfig", {"token_indices": [3, 4], "target_modules": ["embed_tokens"]}),
    Case("bert", "HRAConfig", {"target_modules": ["query", "value"], "r": 4}),
    Case("llama", "HRAConfig", {"target_modules": ["q_proj", "down_proj"], "r": 6, "init_weights": False}),
    Case("t5", "HRAConfig", {"target_modules": ["q", "v"], "r": 2}),
    Case("vit", "HRAConfig", {"target_modules": ["q_proj", "fc1"], "r": 4}),
]
PROMPTS = [
    *[Case(m, "PromptTuningConfig", {"num_virtual_tokens": 5}) for m in ("bert", "gpt2", "opt", "llama", "t5", "bart")],
    *[
        Case(m, "PrefixTuningConfig", {"num_virtual_tokens": 5, **p})
        for m in ("bert", "bert-tok", "bert-qa", "gpt2", "gpt2-cls", "opt", "llama", "llama-cls", "t5", "bart")
        for p in ({}, {"prefix_projection": True, "encoder_hidden_size": 13})
        if not p or m in ("bert", "gpt2", "llama", "t5")
    ],
    *[
        Case(m, "PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 11, **p})
        for m in ("bert", "gpt2", "opt", "llama", "t5", "bart")
        for p in ({}, {"encoder_reparameterization_type": "LSTM"})
        if not p or m in ("bert", "gpt2", "t5")
    ],
]
HEADS = [
    Case("llama", "IA3Config", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"], "feedforward_modules": []}),
    Case("llama", "LNTuningConfig", {"modules_to_save": ["lm_head"]}),
]
CASES = [*LORA, *DORA, *IA3, *LAYERS, *HEADS, *PROMPTS]
