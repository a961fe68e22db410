"""The adapters of one model: putting them in, switching, merging, taking them out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from afina.core.adapted import AdaptedLayer
from afina.core.adapter import Adapter, Placement, SavedModule
from afina.core.codecs import codec_of
from afina.core.config import AdapterConfig, TargetedConfig
from afina.core.initialise import begin
from afina.core.layers import ParameterView, view_of
from afina.core.plan import is_loaded, make_plan, resolved, with_new_heads
from afina.core.registry import method_for
from afina.core.runtime import BASE_ROW, Rows, Runtime, State, replayed
from afina.core.targets import ModuleMap
from afina.core.ties import tied_groups
from afina.errors import AdapterNameError, ConfigError, MergeError, Problems, did_you_mean, shortened

__all__ = ["AdapterSet", "Injected"]

logger = logging.getLogger("afina")
ATTRIBUTE = "afina_adapters"  # where a model keeps its AdapterSet


@dataclass
class Injected:
    """What one call of `AdapterSet.add` did."""

    adapted: dict[str, str] = field(default_factory=dict)  # path -> class of adapter
    saved: list[str] = field(default_factory=list)  # modules trained whole
    new: list[str] = field(default_factory=list)  # of these, newly initialised ones nobody asked for


class AdapterSet:
    """All adapters of one model. One set a model; `AdapterSet.of(model)` finds it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.runtime = Runtime()
        self.configs: dict[str, AdapterConfig] = {}
        self.layers: dict[str, AdaptedLayer] = {}  # "path" or "path#parameter", in the names of the bare model
        self.injected: dict[str, Injected] = {}
        self.prompts = nn.ModuleDict()  # by adapter name; hung into the tree by PeftModel
        self.base: dict[str, Any] | None = None  # fingerprint of the base, taken before its weights went into shards
        self.undo: list[Callable[[], None]] = []  # what else to take back when the adapters are taken out
        self._map: ModuleMap | None = None
        model.__dict__[ATTRIBUTE] = self

    @staticmethod
    def of(model: nn.Module) -> AdapterSet | None:
        """The set of a model, or None where it has no adapters."""
        return model.__dict__.get(ATTRIBUTE)

    @property
    def map(self) -> ModuleMap:
        """Structure of the bare model."""
        if self._map is None:
            self._map = ModuleMap(self.model)
        return self._map

    def forget_map(self) -> None:
        """Look at the structure again: modules of the base were replaced."""
        self._map = None

    @property
    def paths(self) -> list[str]:
        """Paths of the modules that are wrapped, in the names of the bare model."""
        return [key.split("#")[0] for key in self.layers]

    # --- putting adapters in

    def add(self, name: str, config: AdapterConfig, *, initialise: bool = True, strict: bool = True) -> AdapterConfig:
        """Put the adapters of one configuration around the layers it means.

        Returns the configuration with everything resolved (default targets, new heads). With `initialise=False` the
        parameters hold no values yet; `strict=False` lets requested names without a match pass, for a checkpoint whose
        keys are compared afterwards. Nothing is changed when an error is raised.
        """
        self.check_new_name(name)
        with self.unmerged():
            return self._add(name, config, initialise=initialise, strict=strict)

    def _add(self, name: str, config: AdapterConfig, *, initialise: bool, strict: bool) -> AdapterConfig:
        found = Injected()
        self._check_checkpointing()
        config, found.new = with_new_heads(self.map, config, strict=strict)
        plan = make_plan(self.map, config, strict=strict)
        if isinstance(config, TargetedConfig):
            config = resolved(self.map, config, plan)
        built = self._build(plan, config, initialise)
        if initialise:
            begin(self.model, config, built)
        if not self.configs:
            self._freeze()
        for placement, view, adapter in built:
            layer = self._wrap(placement, view)
            adapter.requires_grad_(False)
            layer.add(name, adapter)
            if isinstance(adapter, SavedModule):
                found.saved.append(placement.path)
            else:
                found.adapted[self._key(placement)] = type(adapter).__name__
        self.configs[name] = config
        self.injected[name] = found
        self.remember_state()
        return config

    def check_new_name(self, name: str) -> None:
        """Raise AdapterNameError for a name that is taken or cannot be one."""
        if name in self.configs:
            raise AdapterNameError(
                f"adapter {name!r} is there already; delete_adapter({name!r}) first, or take another name"
            )
        if not name or "." in name or name == BASE_ROW or name in dir(nn.ModuleDict):
            raise AdapterNameError(f"adapter name {name!r} cannot be used: no dots, not empty, not {BASE_ROW!r}")

    def _freeze(self) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for module in self.map.modules.values():  # those without adapters too: gradients go through them (T43)
            codec_of(module).prepare(module)

    def _build(self, plan: list[Placement], config: Any, initialise: bool) -> list[tuple[Placement, Any, Adapter]]:
        """Make all adapters before anything is changed in the model."""
        built: list[tuple[Placement, Any, Adapter]] = []
        by_path: dict[str, Adapter] = {}
        for placement in plan:
            layer = self.layers.get(self._key(placement))
            if layer is not None:
                view = layer.view
            else:
                module = self.map.modules[placement.path]
                view = view_of(module, placement.parameter)
            own = placement.config if placement.config is not None else config.for_module(placement.path)
            device = "cpu" if not initialise and view.device.type == "meta" else None
            adapter = placement.adapter(view, own, device=device, initialise=initialise)
            if placement.shares is not None:
                adapter.share(by_path[placement.shares])
            by_path[placement.path] = adapter
            built.append((placement, view, adapter))
        return built

    @staticmethod
    def _key(placement: Placement) -> str:
        return placement.path if placement.parameter is None else f"{placement.path}#{placement.parameter}"

    def _wrap(self, placement: Placement, view: Any) -> AdaptedLayer:
        """The wrapper at a path, made and hung into the tree where there is none yet."""
        key = self._key(placement)
        if key in self.layers:
            return self.layers[key]
        places = [placement.path, *self.map.aliases.get(placement.path, ())]
        parent, leaf = self._parent(places[0])
        present: nn.Module = parent._modules[leaf]  # type: ignore[assignment]
        if isinstance(view, ParameterView):  # wrapped from outside, around wrappers of other parameters
            view.enter(present)
        view.prepare()
        layer = AdaptedLayer(present, self.runtime, view=view)
        for place in places:
            parent, leaf = self._parent(place)
            parent._modules[leaf] = layer
        self.layers[key] = layer
        return layer

    def _parent(self, path: str) -> tuple[nn.Module, str]:
        above, _, leaf = path.rpartition(".")
        return (self.map.modules[above] if above else self.model), leaf

    # --- switching

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters, in the order they are applied."""
        return self.runtime.state.active

    def check_names(self, names: Iterable[str], *, allow: Sequence[str] = ()) -> None:
        """Raise AdapterNameError naming every unknown name."""
        unknown = [n for n in dict.fromkeys(names) if n not in self.configs and n not in allow]
        if unknown:
            raise AdapterNameError(
                f"no adapter is called {' or '.join(map(repr, unknown))}."
                + did_you_mean(unknown[0], [*self.configs, *allow])
            )

    @staticmethod
    def check_once(names: Sequence[str]) -> None:
        """Raise AdapterNameError for a name that comes twice: the adapter would act twice."""
        if twice := [n for n in dict.fromkeys(names) if names.count(n) > 1]:
            raise AdapterNameError(
                f"{' and '.join(map(repr, twice))} is named twice in {list(names)}; name each adapter once"
            )

    def set_active(self, names: str | Sequence[str], *, trainable: bool = True) -> None:
        """Make these adapters act, in this order, and train; the others do neither (T10)."""
        names = (names,) if isinstance(names, str) else tuple(names)
        self.check_names(names)
        self.check_once(names)
        if any(layer.merged for layer in self.layers.values()):
            self.unmerge()
        for name in {*self.active} - {*names}:
            self.set_trainable(name, False)
        for layer in self.layers.values():
            layer.choose(names)
        self.runtime.choose(names)
        self.runtime.set(active=names)
        for name in names:
            self.set_trainable(name, trainable)

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Let the parameters of one adapter take gradients, or not."""
        for adapter in self.adapters(name):
            adapter.requires_grad_(trainable)

    def adapters(self, name: str) -> Iterator[Any]:
        """The adapters of one name, layer by layer, and its prompt."""
        if name in self.prompts:
            yield self.prompts[name]
        for layer in self.layers.values():
            if name in layer.adapters:
                yield layer.adapters[name]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the block: merged weights are put back for as long."""
        self.remember_state()
        with self.unmerged(), self.runtime.using(State(self.active, enabled=False)):
            yield

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """The stored weights of the base inside the block, what was merged merged again after it."""
        merged = self.merged
        if merged:
            self.unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge([name for name in merged if name in self.configs])

    def set_rows(self, names: Sequence[str] | None, *, steady: bool = False) -> None:
        """Say which adapter each row of the coming batches uses; None: all rows use the active ones. `steady` promises that
        no adapter changes while these rows are set, which is faster where many short passes are made without gradients."""
        if names is None:
            if self.runtime.state.rows is not None:
                self.runtime.set(rows=None)
            return
        self.check_names(names, allow=(BASE_ROW,))
        self.remember_state()
        if self.merged:
            raise MergeError("adapter_names: a mixed batch needs unmerged adapters; call unmerge_adapter() first")
        fused = [key for key, layer in self.layers.items() if {*names} & {*layer.adapters} and "#" in key]
        experts = [p for p in self.layers if ".experts." in f".{p}." and "#" not in p]
        if fused or experts:
            raise MergeError(
                f"adapter_names: {shortened(fused or experts)} see tokens sorted by expert, not rows of the batch, so "
                "rows cannot use different adapters there"
            )
        self.runtime.set(rows=Rows(names, steady=steady))

    def remember_state(self) -> None:
        """Make checkpointed blocks run again under the state they were first run with."""
        modules = [self.model, *self.map.modules.values()]  # not all of the tree: it grows with the adapters
        for name, found in self.injected.items():
            for path in found.saved:
                modules += self.layers[path].adapters[name].modules()
        for module in modules:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, replayed):
                module.__dict__["_gradient_checkpointing_func"] = replayed(function, self.runtime)

    def _check_checkpointing(self) -> None:
        """Raise ConfigError where gradient checkpointing is on in a way that gives the adapters no gradients (T37)."""
        model: Any = self.model
        if getattr(model, "main_input_name", "input_ids") == "input_ids":
            return
        for module in model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if module.__dict__.get("gradient_checkpointing") and getattr(function, "keywords", {}).get("use_reentrant"):
                raise ConfigError(
                    f"gradient checkpointing of {type(model).__name__} was switched on with use_reentrant=True, which needs "
                    "inputs that take gradients; the frozen base does not give them (T37). Switch it on without that"
                )

    # --- taking adapters out

    def delete(self, name: str) -> None:
        """Remove an adapter; where it was the only active one, the first that is left becomes active."""
        self.check_names([name])
        if name in self.merged:
            raise MergeError(f"adapter {name!r} is merged into the base; call unmerge_adapter() first")
        trained = any(p.requires_grad for adapter in self.adapters(name) for p in adapter.parameters())
        self.remove(name)
        if name not in self.active:
            return
        left = tuple(n for n in self.active if n != name)
        if not left and self.configs:
            left = (next(iter(self.configs)),)
            logger.warning("adapter %r was active and is deleted; %r is active now", name, left[0])
        self.set_active(left, trainable=trained)

    def remove(self, name: str) -> None:
        """Take the parameters of one adapter out, and nothing else."""
        for layer in self.layers.values():
            if name in layer.adapters:
                del layer.adapters[name]
        if name in self.prompts:
            del self.prompts[name]
        if name in (self.runtime.chosen or ()):
            self.runtime.choose(None)
        self.configs.pop(name, None)
        self.injected.pop(name, None)

    def unload(self) -> nn.Module:
        """Take every wrapper out of the tree; returns the model, with whatever has been merged into it."""
        self.unwrap()
        for undo in self.undo:
            undo()
        self.model.__dict__.pop(ATTRIBUTE, None)
        return self.model

    def unwrap(self) -> None:
        """Put every layer back in the place of its wrapper."""
        for key, layer in reversed(self.layers.items()):
            path = key.split("#")[0]
            for place in (path, *self.map.aliases.get(path, ())):
                parent, leaf = self._parent(place)
                parent._modules[leaf] = layer.base_layer
        self.layers.clear()

    # --- merging

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are merged into some layer."""
        return tuple(dict.fromkeys(n for layer in self.layers.values() for n in layer.merged))

    def check_mergeable(self, names: Sequence[str]) -> None:
        """Raise AdapterNameError for unknown names, MergeError naming every layer whose adapter cannot be merged."""
        self.check_names(names)
        self.check_once(names)
        problems = Problems("merge")
        for key, layer in self.layers.items():
            for name in names:
                if name in layer.adapters and not layer.adapters[name].mergeable:
                    problems.add(f"{key}: {type(layer.adapters[name]).__name__} ({name}) cannot be merged")
        for name in names:
            if method_for(self.configs[name]).kind == "prompt":
                problems.add(f"{name} is a prompt ({type(self.configs[name]).__name__}): it has no weight to merge into")
        problems.raise_as(MergeError)

    def merge(self, names: Sequence[str] | None = None, *, keep: bool = True) -> None:
        """Put adapters into the stored weights, all of them or none; `keep` holds on to what was stored."""
        names = tuple(self.active if names is None else names)
        self.check_mergeable(names)
        ties = tied_groups(self.model)
        marked = not keep and any(is_loaded(p) for p in self.model.parameters())
        try:
            for layer in self.layers.values():
                layer.merge(names, keep=keep)
        except MergeError:
            if keep:
                self.unmerge()
            raise
        if marked:  # what was merged into the base for good is no newly initialised module of it
            for parameter in (p for layer in self.layers.values() for p in layer.base_layer.parameters()):
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self._map = None
        ties.mend(self.model, untie=not keep)

    def unmerge(self) -> None:
        """Put back the stored bits from before every merge."""
        for layer in self.layers.values():
            layer.unmerge()
        self._map = None
