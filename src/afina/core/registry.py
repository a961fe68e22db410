"""The catalogue of methods. A method registers itself beside its definition; nothing else lists it.

Several methods can share one `peft_type` and configuration (LoRA and DoRA): the one whose `when` holds is taken.
"""

from __future__ import annotations

import enum
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from afina.core.config import AdapterConfig
from afina.errors import ConfigError, did_you_mean

__all__ = ["Method", "config_class", "config_classes", "get_method", "method_for", "methods", "peft_types", "register"]

T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Method:
    """One way to adapt a model, with what `afina methods` says of it."""

    name: str
    adapter: Any  # an Adapter or a Prompt class
    config: type[AdapterConfig]
    trains: str
    cost: str
    paper: str
    when: Callable[[Any], bool] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # that make the configuration mean this method

    @property
    def kind(self) -> str:
        """`layer` for advice around layers, `prompt` for virtual tokens."""
        return "prompt" if hasattr(self.adapter, "prompt_key") else "layer"

    def make_config(self, **options: Any) -> Any:
        """A configuration of this method."""
        return self.config(**{**self.options, **options})


_METHODS: dict[str, Method] = {}


def register(
    name: str,
    *,
    config: type[AdapterConfig],
    trains: str,
    cost: str,
    paper: str,
    when: Callable[[Any], bool] | None = None,
    **options: Any,
) -> Callable[[T], T]:
    """Class decorator: enter an Adapter or Prompt into the catalogue under `name`."""

    def enter(adapter: T) -> T:
        if name in _METHODS:
            raise ConfigError(f"two methods are called {name!r}: {_METHODS[name].adapter} and {adapter}")
        _METHODS[name] = Method(name, adapter, config, trains, cost, paper, when, options)
        return adapter

    return enter


@cache
def _discover() -> None:
    package = importlib.import_module("afina.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"afina.methods.{module.name}")


def methods() -> dict[str, Method]:
    """All methods by name."""
    _discover()
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """The method of this name; raises ConfigError with the nearest names."""
    known = methods()
    if name not in known:
        raise ConfigError(f"method {name!r} is not known.{did_you_mean(name, known)} See `afina methods`.")
    return known[name]


def method_for(config: AdapterConfig) -> Method:
    """The method that a configuration means."""
    fitting = [m for m in methods().values() if m.config.peft_type == config.peft_type]
    special = [m for m in fitting if m.when is not None and m.when(config)]
    plain = [m for m in fitting if m.when is None]
    if len(special) > 1:
        raise ConfigError(f"{type(config).__name__} asks for {' and '.join(m.name for m in special)} at once")
    if not special and not plain:
        raise ConfigError(f"no method goes with {type(config).__name__}")
    return (special or plain)[0]


def config_classes() -> dict[str, type[AdapterConfig]]:
    """Configuration classes by `peft_type`."""
    return {m.config.peft_type: m.config for m in methods().values()}


def config_class(peft_type: str, source: str) -> type[AdapterConfig]:
    """The configuration class of a `peft_type`; raises ConfigError with the nearest names."""
    known = config_classes()
    if peft_type not in known:
        raise ConfigError(f"{source}: peft_type={peft_type!r} is not a method of afina.{did_you_mean(peft_type, known)}")
    return known[peft_type]


@cache
def peft_types() -> Any:
    """The enumeration PEFT calls `PeftType`, of the methods there are."""
    return enum.Enum("PeftType", {name: name for name in sorted(config_classes())}, type=str, module="afina")
