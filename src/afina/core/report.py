"""What an adapted model looks like: a table of every weight-bearing module, which way each adapted layer is computed, and
the card of a saved adapter."""

from __future__ import annotations

import re
from typing import Any

from afina.core.adapted import AdaptedLayer
from afina.core.adapter import Chain, SavedModule
from afina.core.codecs import logical_numel
from afina.core.injection import AdapterSet
from afina.core.registry import method_for

__all__ = ["card", "passes", "table"]


def table(adapters: AdapterSet) -> str:
    """One line for each kind of module: how it is adapted, how many there are, how many values it has.

    Modules that differ in their block numbers alone share a line. Every parameter of the base is counted once: a tied one
    where it is adapted, or else where it is first.
    """
    places: dict[int, tuple[str, str, str, int]] = {}  # parameter -> path, name, state, values
    for path, module in [("", adapters.model), *adapters.map.modules.items()]:
        for name, parameter in module._parameters.items():
            if parameter is not None and (id(parameter) not in places or places[id(parameter)][2] == "frozen"):
                there, state = id(parameter) in places, _state(adapters, path, name)
                if not there or state != "frozen":
                    places[id(parameter)] = (path, name, state, logical_numel(module, name))
    lines: dict[tuple[str, str], tuple[set[str], list[int]]] = {}
    for path, name, state, size in places.values():
        if not size:  # scales and zeros of the weight beside them
            continue
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
        label = pattern if path and name in ("weight", "bias") else f"{pattern}.{name}".lstrip(".")
        modules, sizes = lines.setdefault((label, state), (set(), []))
        modules.add(path)
        sizes.append(size)
    width = max((len(label) for label, _ in lines), default=0)
    rows = sorted(lines.items(), key=lambda item: item[0][1] == "frozen")
    return "\n".join(
        f"{label:<{width}}  x{len(modules):<4} {sum(sizes):>14,d}  {state}" for (label, state), (modules, sizes) in rows
    )


def _state(adapters: AdapterSet, path: str, name: str) -> str:
    """What happens to one parameter of the module at `path`."""
    said = []
    for key in (f"{path}#{name}", path):
        layer = adapters.layers.get(key)
        for adapter_name, adapter in layer.adapters.items() if layer is not None else ():
            if not isinstance(adapter, SavedModule):
                links: Any = adapter.links if isinstance(adapter, Chain) else [adapter]
                said.append(f"{' + '.join(type(link).__name__ for link in links)} ({adapter_name})")
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        outer = ".".join(parts[:i])
        layer = adapters.layers.get(outer)
        for adapter_name, adapter in layer.adapters.items() if layer is not None else ():
            if isinstance(adapter, SavedModule):
                new = ", newly initialised" if outer in adapters.injected[adapter_name].new else ""
                said.append(f"trained whole{new} ({adapter_name})")
    return ", ".join(said) or "frozen"


def passes(adapters: AdapterSet) -> dict[str, str]:
    """For each adapted layer that something acts on, why it is not one operation with its adapter; "" where it is (T35).

    The compiler fuses by itself, and transforms of functions (`torch.func`) take the plain way; neither is told here."""
    found = {}
    for key, layer in adapters.layers.items():
        acting = [layer.adapters[n] for n in adapters.active if n in layer.adapters and n not in layer.merged]
        if acting:
            found[key] = _why_not(layer, acting)
    return found


def _why_not(layer: AdaptedLayer, acting: list[Any]) -> str:
    if len(acting) > 1:
        return f"{len(acting)} adapters act on it"
    adapter = acting[0]
    kind = "one parameter" if layer.view.kind == "parameter" else f"a layer of kind {layer.view.kind}"
    if adapter.low_rank() is None:  # type: ignore[operator]
        names = [type(a).__name__ for a in (adapter.links if isinstance(adapter, Chain) else (adapter,))]
        return f"{' and '.join(names)} on {kind} has no such form"
    return "" if layer.view.product() is not None else f"{type(layer.view.layer).__name__} computes in its own way"


def card(adapters: AdapterSet, name: str) -> str:
    """The README.md of a saved adapter."""
    config: Any = adapters.configs[name]
    method = method_for(config)
    base = config.base_model_name_or_path or ""
    known = [f"base_model: {base}"] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not base.startswith(".") else []
    head = "\n".join(["---", *known, "library_name: peft", "tags:", f"- {method.name}", "- afina", "---"])
    targets = getattr(config, "target_modules", None)
    return f"""{head}

# {method.name} adapter

Trains {method.trains}{f" of {type(adapters.model).__name__}" if adapters.model is not None else ""}.

- base: `{base or "not recorded"}`
- method: {method.name} ({method.paper})
- task: {config.task_type or "not recorded"}
- layers: {", ".join(targets) if isinstance(targets, list) else targets or "see adapter_config.json"}

```python
from afina import AutoPeftModel

model = AutoPeftModel.from_pretrained("this folder")
```
"""
