"""Gradient checkpointing: a block keeps its input alone and is computed again in backward.

Always the kind that records which tensors backward asks for (`use_reentrant=False`): the older kind gives no gradient at
all where a block's input takes none, which is the rule over frozen embeddings (T37). Blocks run again under the adapters
they were first run with, whatever has been switched since, and with the same random numbers.
"""

from __future__ import annotations

import warnings
from typing import Any

from afina.core.config import PromptConfig
from afina.core.registry import method_for
from afina.errors import ConfigError

__all__ = ["checkpoint_blocks"]


def checkpoint_blocks(model: Any, option: str = "memory.gradient_checkpointing") -> None:
    """Switch it on for an adapted model. Raises ConfigError, naming the `option` as typed, where it is not possible."""
    base = model.get_base_model()
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{option}: {type(base).__name__} cannot compute its blocks again; leave it out, and take a larger "
            "training.gradient_accumulation instead"
        )
    in_cache = [
        name
        for name, config in model.peft_config.items()
        if isinstance(config, PromptConfig) and method_for(config).adapter.prefix and base.config.is_encoder_decoder
    ]
    if in_cache:
        raise ConfigError(
            f"{option}: prefix tuning of {type(base).__name__} hands its prefix over in a cache, which checkpointed blocks "
            "drop, so the prefix would not be trained. Leave it out, or take method.name=prompt_tuning or lora"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the old name, for models that only know that
        model.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()  # which only the older kind needs
