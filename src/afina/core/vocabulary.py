"""Vocabularies that were enlarged (T8): the embeddings are stored with the adapter, and the base is resized at load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from afina.errors import CheckpointError

if TYPE_CHECKING:
    from afina.core.injection import AdapterSet

__all__ = [
    "fit_vocabulary",
    "holds_one_side",
    "resized_embeddings",
    "rows_of_checkpoint",
    "take_embeddings",
    "tokenizer_hash",
    "tokenizer_rows",
    "vocabulary_rows",
]

PREFIX = "base_model.model."


_FOUND: WeakKeyDictionary[Any, tuple[Any, str, int]] = WeakKeyDictionary()  # tokenizer -> its state, its hash, its rows


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of vocabulary and special tokens."""
    return _found(tokenizer)[1]


def tokenizer_rows(tokenizer: Any) -> int:
    """Rows of an embedding that has one for each token."""
    return _found(tokenizer)[2]


def _found(tokenizer: Any) -> tuple[Any, str, int]:
    """To go through a vocabulary takes a twentieth of a second: it is done again for a tokenizer that got more tokens."""
    special = sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    state = len(tokenizer), special
    known = _FOUND.get(tokenizer)
    if known is None or known[0] != state:
        vocabulary = tokenizer.get_vocab()
        content = json.dumps([sorted(vocabulary.items()), special]).encode()
        known = _FOUND[tokenizer] = state, hashlib.sha256(content).hexdigest()[:16], max(vocabulary.values(), default=-1) + 1
    return known


def _embeddings(adapters: AdapterSet) -> dict[str, torch.Tensor]:
    """Weights of the input embedding and the output head of the bare model, by path."""
    model: Any = adapters.model
    found = {}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        module = getattr(module, "base_layer", module)
        if module is None or "weight" not in module._parameters:  # pictures are embedded by more than a table
            continue
        path = next((n for n, m in adapters.map.modules.items() if m is module), None)
        if path is not None:
            found[path] = module.weight
    return found


def vocabulary_rows(adapters: AdapterSet) -> int | None:
    """Rows of the input embedding, or None where the model has no such table."""
    return next((int(weight.shape[0]) for weight in _embeddings(adapters).values()), None)


def holds_one_side(adapters: AdapterSet, state: dict[str, torch.Tensor]) -> bool:
    """Whether a file holds something for one side of tied embeddings and nothing for the other."""
    here = _embeddings(adapters)
    tied = len(here) == 2 and len({id(weight) for weight in here.values()}) == 1
    sides = [any(key.startswith(f"{PREFIX}{path}.") for key in state) for path in here]
    return tied and any(sides) and not all(sides)


def resized_embeddings(adapters: AdapterSet, state: dict[str, Any], save: str | bool) -> dict[str, torch.Tensor]:
    """The embeddings that go into the file: with "auto", those whose rows are not those of the base's own checkpoint."""
    if save is False:
        return {}
    tensors = {f"{PREFIX}{path}.weight": weight for path, weight in _embeddings(adapters).items()}
    if save == "auto":
        rows = rows_of_checkpoint(adapters.model)
        if rows is None or all(t.shape[0] == rows for t in tensors.values()):
            return {}
    return {key: tensor for key, tensor in tensors.items() if key not in state}


def rows_of_checkpoint(model: Any) -> int | None:
    """Vocabulary of the checkpoint the base was loaded from, or None where it cannot be told without a download."""
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not path:
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def fit_vocabulary(
    adapters: AdapterSet, state: dict[str, torch.Tensor], rows: int | None, source: str
) -> Callable[[], None]:
    """Resize the base to the vocabulary an adapter was trained with; raises CheckpointError where that cannot be done.
    Returns a function that takes it back."""
    here = _embeddings(adapters)
    if not here:
        return lambda: None
    stored = [state[key] for path in here for key in _keys(path) if key in state]
    present = next(iter(here.values())).shape[0]
    wanted = stored[0].shape[0] if stored else rows
    if wanted is None or wanted == present:
        return lambda: None
    if not stored:
        raise CheckpointError(
            f"{source} was trained with a vocabulary of {wanted} rows, this base has {present}, and the file holds no "
            f"embeddings: call base.resize_token_embeddings({wanted}) with the same tokenizer first"
        )
    if adapters.layers:
        raise CheckpointError(
            f"{source} has a vocabulary of {wanted} rows, this base has {present}, and it cannot be resized under the "
            "adapters it has; load this one first"
        )
    model: Any = adapters.model
    before = {path: weight.detach().clone() for path, weight in here.items()}
    model.resize_token_embeddings(wanted, mean_resizing=False)
    adapters.forget_map()

    def undo() -> None:
        model.resize_token_embeddings(present, mean_resizing=False)
        adapters.forget_map()
        with torch.no_grad():
            for path, weight in _embeddings(adapters).items():
                weight.copy_(before[path])

    return undo


def take_embeddings(
    adapters: AdapterSet, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], source: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The embeddings of a file that are no adapter's, each with the base's tensor they belong into; `state` loses their
    keys. Raises CheckpointError where other adapters are there that were trained with other rows."""
    found = []
    for path, weight in _embeddings(adapters).items():
        for key in _keys(path):
            if key in state and key not in expected and state[key].shape == weight.shape:
                found.append((weight, state.pop(key)))
    if len(adapters.configs) > 1 and not all(torch.equal(old, new.to(old.device, old.dtype)) for old, new in found):
        raise CheckpointError(
            f"{source} holds other embeddings than this base has, and the adapters that are there were trained with those; "
            "load it on a base of its own"
        )
    return found


def _keys(path: str) -> tuple[str, str]:
    """Where a file may hold an embedding: plain, and as PEFT names it where it has an adapter of its own."""
    return f"{PREFIX}{path}.weight", f"{PREFIX}{path}.base_layer.weight"
