"""What a state of an adapted model holds: the adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from afina.errors import CheckpointError, Problems, shortened

__all__ = ["adapters_alone", "base_not_missing"]


def adapters_alone(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """`state_dict()` holds the adapters, each tensor once: the base is frozen and comes from its own checkpoint."""
    seen: set[int] = set()
    owned = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for key in [k for k in state if k.startswith(f"{prefix}base_model.")]:
        tensor = id(owned.get(key.removeprefix(prefix), state[key]))
        if not _of_adapter(key) or tensor in seen:
            del state[key]
        seen.add(tensor)


def base_not_missing(module: nn.Module, incompatible: Any) -> None:
    """What is left out of `state_dict()` is not missing. Raises CheckpointError where the state is another adapter's,
    which a resumed run must not pass over (T3)."""
    kept = module.state_dict()
    incompatible.missing_keys[:] = missing = [k for k in incompatible.missing_keys if k in kept]
    unused = [k for k in incompatible.unexpected_keys if _of_adapter(k) or k.startswith("prompt_encoder.")]
    if missing and unused:
        problems = Problems("load_state_dict")
        problems.add(f"{len(missing)} keys of this model are missing: {shortened(missing)}")
        problems.add(f"{len(unused)} keys fit nothing in it: {shortened(unused)}")
        problems.raise_as(
            CheckpointError, "The state belongs to another adapter; make the model with the same configuration."
        )


def _of_adapter(key: str) -> bool:
    return ".adapters." in key
