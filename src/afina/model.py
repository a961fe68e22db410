"""The face: PEFT's names and meanings over the core.

Where afina means something else on purpose it says so: wrapping an adapted model again is an error, `state_dict()` holds
the adapters alone (the base is frozen and has a checkpoint of its own), merging a tied weight never changes the other
side, and combining adapters reports its error.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from afina.core.codecs import counted
from afina.core.config import AdapterConfig, PromptConfig, changed
from afina.core.injection import AdapterSet
from afina.core.prompts import PromptFeeder, complete_prompt_config
from afina.core.registry import method_for
from afina.core.report import table
from afina.errors import (
    AdapterNameError,
    AlreadyAdaptedError,
    ConfigError,
)
from afina.merging import AdapterMerging
from afina.state import adapters_alone, base_not_missing

__all__ = [
    "MODEL_TYPES",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]

logger = logging.getLogger("afina")


class AdaptedBase(nn.Module):
    """Holds the base model, so that names read `base_model.model...` as PEFT's do."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self._modules["model"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class PeftModel(AdapterMerging):
    """A base model with adapters. Everything it does not define itself is the base model's."""

    task_type: ClassVar[str | None] = None

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        return super().__new__(_class_for(_plain(cls), type(model)))  # type: ignore[arg-type]

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        _refuse_adapted(model)
        self._wrap(model)
        peft_config = copy.copy(peft_config)
        if not autocast_adapter_dtype:
            peft_config.autocast_adapter_dtype = False  # type: ignore[attr-defined]
        try:
            self._add(adapter_name, peft_config)
        except Exception:
            self.adapters.unload()
            raise
        self.adapters.set_active(adapter_name, trainable=not peft_config.inference_mode)

    def _wrap(self, model: nn.Module) -> None:
        self.base_model = AdaptedBase(model)
        self.adapters = AdapterSet(model)
        self.prompt_encoder = self.adapters.prompts
        self.register_state_dict_post_hook(adapters_alone)
        self.register_load_state_dict_post_hook(base_not_missing)

    def __reduce__(self) -> Any:
        return _rebuild, (_plain(type(self)), type(self.get_base_model())), self.__dict__

    def _replicate_for_data_parallel(self) -> Any:
        raise ConfigError(
            "nn.DataParallel copies a model in every step by copying its modules' attributes, and copies of adapters would "
            "follow the switches of their original. Start one process for each GPU instead (torchrun --nproc-per-node=N, "
            "accelerate launch, afina train --processes N), or show this process one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self._modules["base_model"].model, name)  # type: ignore[union-attr]

    # --- forward

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward under the active adapters, or with `adapter_names`, one name a row of the batch."""
        if adapter_names is None:
            return self.base_model.model(*args, **kwargs)
        self.adapters.set_rows(self._checked_rows(adapter_names, args, kwargs))
        try:
            return self.base_model.model(*args, **kwargs)
        finally:
            self.adapters.set_rows(None)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate` under the active adapters, or with one adapter a row, also with beams."""
        self.adapters.set_rows(self._checked_rows(adapter_names, args, kwargs), steady=True)
        try:
            return self.base_model.model.generate(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.adapters.set_rows(None)

    def _checked_rows(self, names: Sequence[str] | None, args: Any, kwargs: Any) -> Sequence[str] | None:
        if names is None:
            return None
        if isinstance(names, str):
            raise AdapterNameError(f"adapter_names={names!r}: expected one name for each row of the batch, in a list")
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim()]
        if tensors and tensors[0].shape[0] != len(names):
            raise AdapterNameError(f"adapter_names has {len(names)} names, but the batch has {tensors[0].shape[0]} rows")
        return names

    @property
    def accepts_loss_kwargs(self) -> bool:
        """What transformers' Trainer asks: whether the base model's loss takes `num_items_in_batch`."""
        base = self.get_base_model()
        if hasattr(base, "accepts_loss_kwargs"):
            return bool(base.accepts_loss_kwargs)
        parameters = inspect.signature(type(base).forward).parameters.values()
        return any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The base model's, made safe for adapters: blocks run again under the state they were first run with."""
        settings = (args[0] if args else None) or next(iter(kwargs.values()), None)
        base: Any = self.get_base_model()
        if isinstance(settings, dict) and settings.get("use_reentrant"):
            if getattr(base, "main_input_name", "input_ids") != "input_ids":
                raise ConfigError(
                    "use_reentrant=True needs inputs that take gradients, which the frozen base of "
                    f"{type(base).__name__} does not give (T37); leave it out"
                )
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable(*args, **kwargs)
        self.adapters.remember_state()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """See `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    # --- what there is

    def get_base_model(self) -> nn.Module:
        """The model below the adapters, with the wrapped layers in it."""
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations by adapter name."""
        return self.adapters.configs

    @property
    def active_peft_config(self) -> Any:
        """Configuration of the first active adapter."""
        return self.adapters.configs[self.active_adapter]

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order they are applied."""
        return list(self.adapters.active)

    @property
    def active_adapter(self) -> str:
        """Name of the first active adapter."""
        if not self.adapters.active:
            raise AdapterNameError(f"no adapter is active; there are {', '.join(map(repr, self.peft_config)) or 'none'}")
        return self.adapters.active[0]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; a packed weight counts the values it stands for."""
        trainable = total = 0
        for parameter, count in counted(self):
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print these numbers and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def adapter_report(self) -> str:
        """A table of what is adapted, trained whole and frozen, every weight-bearing module named (T14)."""
        return table(self.adapters)

    # --- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a second adapter, neither active nor trained before `set_adapter`. `low_cpu_mem_usage` changes nothing."""
        if not autocast_adapter_dtype:
            peft_config = changed(peft_config, autocast_adapter_dtype=False)
        self._add(adapter_name, peft_config)

    def _add(
        self, name: str, config: AdapterConfig, *, initialise: bool = True, strict: bool = True, bare: bool = False
    ) -> None:
        method = method_for(config)
        base = self.get_base_model()
        if config.base_model_name_or_path is None:
            path = getattr(getattr(base, "config", None), "_name_or_path", None) or getattr(base, "name_or_path", None)
            config = changed(config, base_model_name_or_path=path or None)
        if config.task_type is None and self.task_type is not None:
            config = changed(config, task_type=self.task_type)
        if config.task_type is None and config.auto_mapping is None:
            named = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
            config = changed(config, auto_mapping=named)
        if method.kind == "layer":
            self.adapters.add(name, config, initialise=initialise, strict=strict)
            return
        assert isinstance(config, PromptConfig)
        config = changed(config, **complete_prompt_config(config, base, method.adapter))
        feeder = next((h for h in base._forward_pre_hooks.values() if isinstance(h, PromptFeeder)), None)
        feeder = feeder or PromptFeeder(self.adapters)
        prompt = method.adapter(config, base, initialise=initialise, bare=bare)
        if method.adapter.prefix:
            feeder.install_prefix(self.adapters.map, int(config.num_layers or 0))
        self.adapters.add(name, config, initialise=initialise, strict=strict)
        self.adapters.prompts[name] = prompt.requires_grad_(False)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several in this order, act and train; all others do neither."""
        if not adapter_name:
            raise AdapterNameError(
                "set_adapter was given no name; use `with model.disable_adapter()` for the base's answers"
            )
        self.adapters.set_active(adapter_name, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it was the only active one, the first that is left becomes active."""
        self.adapters.delete(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model inside the block, bit for bit."""
        with self.adapters.disabled():
            yield

    # --- files

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        subfolder: str | None = None,
        tokenizer: Any = None,
        **hub: Any,
    ) -> PeftModel:
        """The base `model` with the adapter of a folder or hub repository around its layers.

        Raises CheckpointError where a key does not fit and BaseMismatchError where the adapter was trained on another
        base; `strict=False` loads what fits. In eval mode and frozen unless `is_trainable`. Other options are those of
        `load_adapter`.
        """
        _refuse_adapted(model, loading=str(model_id))
        read = config or AdapterConfig.from_pretrained(model_id, subfolder=subfolder, **hub)
        if cls is PeftModel and read.task_type:
            cls = MODEL_TYPES[read.task_type]
        wrapped: PeftModel = _class_for(_plain(cls), type(model)).__new__(cls, model)  # type: ignore[arg-type]
        nn.Module.__init__(wrapped)
        wrapped._wrap(model)
        try:
            wrapped.load_adapter(
                model_id, adapter_name, is_trainable=is_trainable, config=read, strict=strict, subfolder=subfolder,
                autocast_adapter_dtype=autocast_adapter_dtype, ephemeral_gpu_offload=ephemeral_gpu_offload,
                key_mapping=key_mapping, tokenizer=tokenizer, **hub,
            )  # fmt: skip
        except Exception:
            wrapped.adapters.unload()
            raise
        wrapped.adapters.set_active(adapter_name, trainable=is_trainable)
        return wrapped.train(is_trainable)


class PeftModelForSequenceClassification(PeftModel):
    """For models that give one label a row."""

    task_type = "SEQ_CLS"


class PeftModelForSeq2SeqLM(PeftModel):
    """For encoder-decoders that write text."""

    task_type = "SEQ_2_SEQ_LM"


class PeftModelForCausalLM(PeftModel):
    """For decoders that write text."""

    task_type = "CAUSAL_LM"


class PeftModelForTokenClassification(PeftModel):
    """For models that give one label a token."""

    task_type = "TOKEN_CLS"


class PeftModelForQuestionAnswering(PeftModel):
    """For models that mark a span."""

    task_type = "QUESTION_ANS"


class PeftModelForFeatureExtraction(PeftModel):
    """For models that give hidden states."""

    task_type = "FEATURE_EXTRACTION"


MODEL_TYPES: dict[str, type[PeftModel]] = {
    cls.task_type: cls
    for cls in (
        PeftModelForSequenceClassification, PeftModelForSeq2SeqLM, PeftModelForCausalLM, PeftModelForTokenClassification,
        PeftModelForQuestionAnswering, PeftModelForFeatureExtraction,
    )
    if cls.task_type
}  # fmt: skip


@functools.cache
def _class_for(cls: Any, base: Any) -> Any:
    """`cls` with the base model's forward signature, by which Trainer finds labels and columns (T39)."""

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "_plain": cls})


def _plain(cls: type[PeftModel]) -> type[PeftModel]:
    return cls.__dict__.get("_plain", cls)


def _rebuild(cls: type[PeftModel], base: type[nn.Module]) -> PeftModel:
    made = _class_for(cls, base)  # type: ignore[arg-type]
    return object.__new__(made)


def _refuse_adapted(model: nn.Module, loading: str = "") -> None:
    foreign = next((type(m) for m in model.modules() if type(m).__module__.startswith("peft.")), None)
    if foreign is not None:
        raise AlreadyAdaptedError(
            f"this {type(model).__name__} carries adapters made by PEFT ({foreign.__name__}), which would be frozen and "
            "left out of what is saved (T2). Save them with PEFT and load the folder with PeftModel.from_pretrained, or "
            "start from model.merge_and_unload()"
        )
    there = model.adapters if isinstance(model, PeftModel) else AdapterSet.of(model)
    if there is not None:
        cure = f"model.load_adapter({loading!r}, 'another_name')" if loading else "model.add_adapter('another_name', config)"
        raise AlreadyAdaptedError(
            f"this {type(model).__name__} is adapted already, with {', '.join(map(repr, there.configs))}; wrapping it again "
            f"would throw that away (T2). Use {cure}, or start from model.unload()"
        )
