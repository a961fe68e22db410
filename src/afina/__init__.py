"""afina tunes pretrained transformers to people's own data by training a small number of parameters.

The public names are PEFT's, with PEFT's meaning; see `docs/architecture.md` for how it works inside. Everything is
imported when it is first asked for, so that the command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "afina.auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "afina.functions": (
        "get_peft_config", "get_peft_model", "get_peft_model_state_dict", "inject_adapter_in_model",
        "prepare_model_for_kbit_training", "set_peft_model_state_dict",
    ),
    "afina.hotswap": ("hotswap_adapter", "prepare_model_for_compiled_hotswap"),
    "afina.model": (
        "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
    ),
    "afina.core.config": ("TaskType",),
    "afina.core.adapter": ("Adapter", "Delta", "Replacement", "Rotation", "Scale"),
    "afina.core.registry": ("get_method", "register"),
    "afina.methods.bitfit": ("BitFitConfig",),
    "afina.methods.bottleneck": ("BottleneckConfig",),
    "afina.methods.hra": ("HRAConfig",),
    "afina.methods.ia3": ("IA3Config",),
    "afina.methods.last_layers": ("LastLayersConfig",),
    "afina.methods.ln_tuning": ("LNTuningConfig",),
    "afina.methods.lora": ("LoraConfig",),
    "afina.methods.p_tuning": ("PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "afina.methods.prefix_tuning": ("PrefixTuningConfig",),
    "afina.methods.prompt_tuning": ("PromptTuningConfig", "PromptTuningInit"),
    "afina.methods.trainable_tokens": ("TrainableTokensConfig",),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_WHERE, "PeftConfig", "PeftType"])


def __getattr__(name: str) -> Any:
    if name == "PeftConfig":
        return import_module("afina.core.config").AdapterConfig
    if name == "PeftType":
        return import_module("afina.core.registry").peft_types()
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'afina' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
