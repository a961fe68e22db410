"""Tokenizer and model are checked against each other before anything is encoded (T8).

A token whose number the embeddings have no row for would end in an index error in the middle of training, or read another
token's row. Where the tokenizer knows more tokens than the model, the embeddings get rows for them; the rows are trained
and stored with the adapter, since new rows are random and would come back as others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from afina.core.config import AdapterConfig
from afina.core.vocabulary import tokenizer_rows
from afina.errors import ConfigError, shortened

__all__ = ["add_tokens", "fit_embeddings"]


def add_tokens(tokenizer: Any, tokens: list[str]) -> list[str]:
    """Give the tokenizer new tokens; returns those it did not know."""
    new = [token for token in tokens if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new)
    return new


def fit_embeddings(model: Any, tokenizer: Any, config: AdapterConfig, asked: str = "the tokenizer") -> list[str]:
    """Rows of the embeddings for all tokens, trained where they are new; returns what was done, as sentences.

    Nothing is done where there is no tokenizer. `asked` names the option that new tokens came from. Raises ConfigError where
    the method cannot train single rows.
    """
    notes: list[str] = []
    if tokenizer is None or (embeddings := _embeddings(model)) is None:
        return notes
    rows, needed = int(embeddings.weight.shape[0]), tokenizer_rows(tokenizer)
    if needed > rows:
        if not any(f.name == "trainable_token_indices" for f in dataclasses.fields(config)):
            raise ConfigError(
                f"{asked} need {needed - rows} new rows in the model's embeddings, which this method cannot train; take "
                "method lora or trainable_tokens"
            )
        model.resize_token_embeddings(needed, mean_resizing=True)
        new = list(range(rows, needed))
        _train_rows(model, config, new)
        names = shortened(tokenizer.convert_ids_to_tokens(new))
        notes.append(f"{len(new)} tokens that the model has no embedding for get new rows, which are trained: {names}")
    for role in ("bos", "eos", "pad"):
        here, there = getattr(tokenizer, f"{role}_token_id"), getattr(model.config, f"{role}_token_id", None)
        if role != "pad" and here is not None and isinstance(there, int) and here != there:
            token = tokenizer.convert_ids_to_tokens(here)
            notes.append(f"the {role} token is {here} ({token}), as the tokenizer has it; the model was made with {there}")
            setattr(model.config, f"{role}_token_id", here)
    return notes


def _embeddings(model: Any) -> Any:
    """The embeddings of tokens; None where a model reads none."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _train_rows(model: Any, config: Any, rows: list[int]) -> None:
    path = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    given = config.trainable_token_indices
    if isinstance(given, dict):
        config.trainable_token_indices = {**given, path: sorted({*given.get(path, ()), *rows})}
    else:
        config.trainable_token_indices = {path: sorted({*(given or ()), *rows})}
