"""Loading a base model and its adapter together, from what the adapter's folder says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from afina.core import checkpoint
from afina.core.config import HUB_OPTIONS, AdapterConfig
from afina.errors import ConfigError
from afina.model import PeftModel

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]


class AutoPeftModel:
    """Loads the base model that an adapter names, and the adapter around it."""

    auto_class: ClassVar[str] = "AutoModel"
    task: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        base_model: str | Path | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Base and adapter; `base_model` names the base where it has moved, other keywords go to its `from_pretrained`.

        No module that a file names is ever imported, so `import_allowlist` allows nothing: a base that is no class of
        transformers is made by its own code and handed to `PeftModel.from_pretrained`.
        """
        import transformers

        source = pretrained_model_name_or_path
        hub = {"revision": revision, **{k: v for k, v in kwargs.items() if k in HUB_OPTIONS}}
        read = config or AdapterConfig.from_pretrained(source, **hub)
        path = str(base_model or read.base_model_name_or_path or "")
        if not path:
            raise ConfigError(f"{source} does not say which base it belongs to; give base_model=..., a folder or hub id")
        if read.task_type and cls.task and read.task_type != cls.task:
            raise ConfigError(f"{source} is an adapter for {read.task_type}; {cls.__name__} loads {cls.task}")
        auto: Any = getattr(transformers, cls.auto_class)
        if cls is AutoPeftModel and read.task_type:
            auto = getattr(transformers, AUTO_CLASSES[read.task_type])
        elif cls is AutoPeftModel and (name := (read.auto_mapping or {}).get("base_model_class")):
            auto = getattr(transformers, name, None)
            if auto is None:  # no module that a file names is imported
                raise ConfigError(f"{source} belongs to a {name}, which transformers has not; load it with PeftModel")
        state = checkpoint.read_state(source, **hub)
        if "num_labels" not in kwargs and (labels := _head_rows(state)) is not None:
            kwargs["num_labels"] = labels
        base = auto.from_pretrained(path, revision=read.revision, **kwargs)
        return PeftModel.from_pretrained(base, source, adapter_name, is_trainable, config=read, **hub)


def _head_rows(state: dict[str, torch.Tensor]) -> int | None:
    """How many labels the stored head has: rows of its last matrix."""
    ends = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    return next((t.shape[0] for k, t in state.items() if k.endswith(ends)), None)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For adapters of decoders that write text."""

    auto_class, task = "AutoModelForCausalLM", "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For adapters of encoder-decoders."""

    auto_class, task = "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For adapters of sequence classifiers."""

    auto_class, task = "AutoModelForSequenceClassification", "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For adapters of token classifiers."""

    auto_class, task = "AutoModelForTokenClassification", "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For adapters of extractive question answering."""

    auto_class, task = "AutoModelForQuestionAnswering", "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For adapters of encoders."""

    auto_class, task = "AutoModel", "FEATURE_EXTRACTION"


AUTO_CLASSES = {
    cls.task: cls.auto_class
    for cls in (
        AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification, AutoPeftModelForQuestionAnswering, AutoPeftModelForFeatureExtraction,
    )
    if cls.task
}  # fmt: skip
