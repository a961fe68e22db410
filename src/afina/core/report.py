"""What an adapted model looks like: a table of every weight-bearing module, and the card of a saved adapter."""

from __future__ import annotations

import re
from typing import Any

from afina.core.codecs import logical_numel
from afina.core.injection import AdapterSet
from afina.core.registry import method_for

__all__ = ["card", "table"]


def table(adapters: AdapterSet) -> str:
    """One line for each kind of module: how it is adapted, how many there are, how many values it has.

    Modules that differ in their block numbers alone share a line. Nothing that holds weights is left out.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    new = {n for injected in adapters.injected.values() for n in injected.new}
    for path, module in adapters.map.modules.items():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            state = _state(adapters, path, name, new)
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", path)
            line = counts.setdefault((f"{pattern}.{name}" if state == "frozen" and name != "weight" else pattern, state), [0, 0])
            line[0] += 1
            line[1] += logical_numel(parameter)
    width = max((len(pattern) for pattern, _ in counts), default=0)
    rows = sorted(counts.items(), key=lambda item: item[0][1] == "frozen")
    return "\n".join(f"{pattern:<{width}}  x{n:<4} {size:>14,d}  {state}" for (pattern, state), (n, size) in rows)


def _state(adapters: AdapterSet, path: str, name: str, new: set[str]) -> str:
    for key, layer in adapters.layers.items():
        where, _, parameter = key.partition("#")
        if (parameter and (where, parameter) == (path, name)) or (not parameter and where == path):
            return ", ".join(f"{type(a).__name__} ({n})" for n, a in layer.adapters.items()) or "frozen"
        if not parameter and path.startswith(f"{where}.") and any(n in new or not n for n in (where,)):
            return "trained whole, newly initialised"
        if not parameter and path.startswith(f"{where}."):
            return "trained whole"
    return "frozen"


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
