"""Loads a base with the head of a task, and nothing else new: weights missing below the head are an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afina.errors import ConfigError, shortened

if TYPE_CHECKING:
    from afina.tasks.task import Task

__all__ = ["load_base", "own_labels", "renew_heads"]


def load_base(task: Task, auto: Any, path: str, *, heads: tuple[str, ...] | None = None, **settings: Any) -> Any:
    """A model of one of transformers' Auto classes, stored as `task.storage` says, its padding id set.

    `heads`: prefixes of the parameters that may be new; None: everything outside the base model proper. `settings` go into
    the configuration. Raises ConfigError where the architecture has no such head or weights are missing or misshapen.
    """
    try:
        model, info = task.storage.load(auto, path, **settings)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        wanted = auto.__name__.removeprefix("AutoModel").removeprefix("For") or "encoder"
        raise ConfigError(f"model {path}: transformers has no {wanted} model of this architecture") from error
    new = _outside_base(model) if heads is None else heads
    mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"] if not str(entry[0]).startswith(new))
    if mismatched:
        raise ConfigError(f"model {path}: weights of another shape than its configuration says: {shortened(mismatched)}")
    below = sorted(k for k in info["missing_keys"] if not k.startswith(new) and ".pooler." not in f".{k}")
    if below:
        raise ConfigError(f"model {path}: the checkpoint lacks weights below the head: {shortened(below)}")
    if task.tokenizer is not None:
        model.config.pad_token_id = task.tokenizer.pad_token_id
    return model


def own_labels(path: str) -> list[str]:
    """The classes of a checkpoint, in the order of its outputs."""
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(path).id2label
    return [str(names[i]) for i in sorted(names)]


def renew_heads(model: Any, outputs: int) -> None:
    """Make the layers anew that put out the classes: a head of others, though as many, is no beginning (T5)."""
    for name, head in model.named_children():
        if name != model.base_model_prefix:
            for module in head.modules():
                weight = module._parameters.get("weight")
                if weight is None or weight.shape[0] != outputs:
                    continue
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter._is_hf_initialized = False  # else nothing is done with it
                module._is_hf_initialized = False
                model._init_weights(module)
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter._is_hf_initialized = False


def _outside_base(model: Any) -> tuple[str, ...]:
    base = model.base_model_prefix
    return tuple(f"{name}." for name, _ in model.named_children() if name != base)
