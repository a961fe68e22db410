"""Where the adapters of a configuration go, and everything that can be wrong with it, before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from afina.core.adapter import Placement, SavedModule
from afina.core.config import TargetedConfig, TaskType, name_matches
from afina.core.layers import view_of
from afina.core.registry import get_method, method_for
from afina.core.targets import ModuleMap, compact_names
from afina.core.ties import tied_names
from afina.core.vocabulary import rows_of_checkpoint
from afina.errors import Problems, TargetError, did_you_mean, shortened

__all__ = ["is_loaded", "make_plan", "new_modules", "resolved", "with_new_heads"]

_WITH_NEW_HEAD = {TaskType.SEQ_CLS.value, TaskType.TOKEN_CLS.value, TaskType.QUESTION_ANS.value}


def with_new_heads(modules: ModuleMap, config: Any, *, strict: bool) -> tuple[Any, list[str]]:
    """The configuration with every newly initialised module and every new head in `modules_to_save` (T5), and those that
    nobody asked for."""
    asked = modules.saved_names(config.modules_to_save, Problems(""), strict=False)  # a wrong name is told with the rest
    names, added = list(config.modules_to_save or ()), []
    if strict:
        new = new_modules(modules)
        if config.task_type in _WITH_NEW_HEAD:
            new += [n for n in modules.modules if modules._in_head(n) and "." not in n]
        for path in dict.fromkeys(new):
            if not any(path == a or path.startswith(f"{a}.") for a in asked):
                if next(modules.modules[path].parameters(), None) is None:
                    continue
                names.append(path)
                asked.append(path)
                added.append(path)
        if _saved_everything(modules, names):
            raise TargetError(f"modules_to_save={names} covers the whole model; there is nothing left to adapt")
    return dataclasses.replace(config, modules_to_save=names or None), added


def _saved_everything(modules: ModuleMap, names: list[str]) -> bool:
    return bool(names) and all(any(p.startswith(f"{n}.") for n in names) for p, _ in modules.model.named_parameters())


def make_plan(modules: ModuleMap, config: Any, *, strict: bool) -> list[Placement]:
    """Every adapter that a configuration asks for and where it goes; raises TargetError with all that is wrong."""
    problems = Problems(type(config).__name__)
    plan: list[Placement] = []
    method = method_for(config)
    if method.kind == "layer":
        plan += method.adapter.placements(modules, config, strict=strict)
    saved = modules.saved_names(config.modules_to_save, problems, strict=strict and method.kind == "prompt")
    tie = getattr(config, "ensure_weight_tying", False)
    for placement in [p for p in plan if tie and p.shares is None and p.parameter is None]:
        if alone := set(tied_names(modules, placement.path)) - {p.path for p in plan}:
            problems.add(
                f"ensure_weight_tying=True: {placement.adapter.__name__} on {placement.path} cannot be tied to "
                f"{shortened(sorted(alone))}; LoRA, trainable tokens and modules_to_save can"
            )
    for path in saved:
        others = [n for n in tied_names(modules, path) if n != path]
        if others and not tie and strict and not set(others) <= set(saved):
            as_one = "set ensure_weight_tying=True to train both as one, or " * hasattr(config, "ensure_weight_tying")
            problems.add(
                f"modules_to_save trains {path!r}, whose weight is tied to {shortened(others)}: training one side "
                f"alone would break the tie (T6); {as_one}name both to train them apart"
            )
        plan.append(Placement(path, SavedModule))
        if tie:
            plan += [Placement(o, SavedModule, shares=path) for o in others if o not in saved]
    if tie:
        for i, path in enumerate(saved):
            first = next((s for s in saved[:i] if s in tied_names(modules, path)), None)
            if first is not None:
                next(p for p in plan if p.path == path and p.adapter is SavedModule).shares = first
    tokens = getattr(config, "trainable_token_indices", None)
    if tokens:
        plan += get_method("trainable_tokens").adapter.companions(modules, tokens, tie=tie, problems=problems)
    if strict:
        _check_tables(modules, plan, problems)
        _check_patterns(config, plan, problems)
    _check_kinds(modules, plan, problems)
    if strict and not plan and method.kind == "layer" and not problems.found:
        problems.add(f"target_modules={config.target_modules!r}: there is nothing to adapt, so nothing would be trained")
    problems.raise_as(TargetError)
    return plan


def _check_tables(modules: ModuleMap, plan: list[Placement], problems: Problems) -> None:
    """Embeddings that are one table, as in T5, can be adapted as one alone: files of transformers hold it once (T6)."""
    tables = {n for n, m in modules.modules.items() if isinstance(m, nn.Embedding)}
    for placement in plan:
        others = {n for n in tied_names(modules, placement.path) if n in tables and n != placement.path}
        if placement.path not in tables or not others or placement.parameter is not None:
            continue
        together = {p.shares or p.path for p in plan if p.path in others or p is placement}
        if len(together) > 1 or not others <= {p.path for p in plan}:
            problems.add(
                f"{placement.adapter.__name__} on {placement.path!r}, which is one table with {shortened(sorted(others))}: "
                "they can be changed together alone (T6). Set ensure_weight_tying=True"
            )


def _check_patterns(config: Any, plan: Iterable[Placement], problems: Problems) -> None:
    paths = [p.path if p.parameter is None else f"{p.path}.{p.parameter}" for p in plan]
    for field_name in config.overrides:
        for pattern in getattr(config, field_name) or {}:
            if not any(name_matches(pattern, path) for path in paths):
                ends = {path.rsplit(".", 1)[-1] for path in paths}
                problems.add(
                    f"{field_name} entry {pattern!r} matches none of the adapted layers.{did_you_mean(pattern, ends)}"
                )


def _check_kinds(modules: ModuleMap, plan: Iterable[Placement], problems: Problems) -> None:
    for placement in plan:
        module = modules.modules[placement.path]
        if placement.parameter is not None:
            kind = "parameter"
        else:
            try:
                kind = view_of(module).kind
            except TargetError as error:
                problems.add(f"{placement.path}: {error}")
                continue
        if kind not in placement.adapter.kinds:
            problems.add(
                f"{placement.path} is a {type(module).__name__}, which {placement.adapter.__name__} cannot adapt "
                f"(it adapts layers of kind {', '.join(sorted(placement.adapter.kinds))})"
            )


def resolved(modules: ModuleMap, config: TargetedConfig, plan: list[Placement]) -> TargetedConfig:
    """The configuration with targets by name where they were found by default, so that a file says them."""
    own = method_for(config).adapter
    tied = [p for p in plan if config.ensure_weight_tying and p.shares is not None]
    if saved := [p.path for p in tied if p.adapter is SavedModule]:  # PEFT ties what is named
        names = dict.fromkeys([*(config.modules_to_save or ()), *saved])
        config = dataclasses.replace(config, modules_to_save=list(names))
    if config.target_modules is not None and config.target_modules != "all-linear" and not config.target_scope:
        targets = [p.path for p in tied if issubclass(p.adapter, own)]
        if isinstance(config.target_modules, list) and targets:
            config = dataclasses.replace(config, target_modules=[*config.target_modules, *targets])
        return config
    paths = [p.path for p in plan if p.parameter is None and p.shares is None and issubclass(p.adapter, own)]
    return dataclasses.replace(config, target_modules=compact_names(paths, modules.modules))


def is_loaded(parameter: torch.Tensor) -> bool:
    """Whether transformers took this parameter from a checkpoint."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def new_modules(modules: ModuleMap) -> list[str]:
    """Modules whose weights were not in the checkpoint the model was loaded from, outermost first.

    transformers marks every parameter that it loaded; a model that was made from a configuration has no marks, and
    nothing is said of it. A module that owns new parameters beside loaded ones is named as a whole; an output head that
    was made anew when the vocabulary was resized is not new (its rows are stored as the vocabulary's are).
    Raises TargetError for a new parameter of the model itself, which no module stands for.
    """
    marks: dict[str, bool] = {}
    seen: set[int] = set()
    for path, module in [("", modules.model), *modules.modules.items()]:  # the bare model, without its adapters
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                marks[f"{path}.{name}".lstrip(".")] = is_loaded(parameter)
    if not any(marks.values()) or all(marks.values()):
        return []
    with_new: set[str] = set()
    with_loaded: set[str] = set()
    for name, there in marks.items():
        parts = name.split(".")
        (with_loaded if there else with_new).update(".".join(parts[:i]) for i in range(1, len(parts)))
    new: list[str] = []
    for path in modules.modules:
        if path in with_new and path not in with_loaded:
            if not any(path.startswith(f"{outer}.") for outer in new):
                new.append(path)
    owners = dict.fromkeys(name.rpartition(".")[0] for name, there in marks.items() if not there)
    if "" in owners:
        own = [name for name, there in marks.items() if not there and "." not in name]
        raise TargetError(
            f"{', '.join(own)} of {type(modules.model).__name__} was not in the checkpoint and belongs to no module, so it "
            "cannot be saved with the adapter (T5): put it into a module of the model, or save the whole base with "
            "save_pretrained and load that"
        )
    new += [o for o in owners if o in modules.modules and not any(o == n or o.startswith(f"{n}.") for n in new)]
    output: Any = getattr(modules.model, "get_output_embeddings", lambda: None)()
    output = getattr(output, "base_layer", output)
    resized = [n for n in new if modules.modules[n] is output]
    if resized and rows_of_checkpoint(modules.model) not in (None, output.weight.shape[0]):
        new = [n for n in new if n not in resized]
    return new
