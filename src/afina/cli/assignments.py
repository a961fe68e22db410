"""`key=value` on the command line, as the types that a dataclass declares."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from afina.errors import Problems, did_you_mean

__all__ = ["method_options"]


def method_options(typed: Sequence[str], config: Any, name: str, problems: Problems) -> dict[str, Any]:
    """Options of a method's configuration class; adds every one that is unknown or of the wrong type to `problems`."""
    from afina.training.recipe import LISTS, NOT_IN_RECIPES, parse_value

    hints = typing.get_type_hints(config)
    known = {f.name for f in dataclasses.fields(config)} - NOT_IN_RECIPES
    values: dict[str, Any] = {}
    for word in typed:
        key, equals, text = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            problems.add(f"{word!r} is not understood; options of the method are written key=value, for example r=16")
        elif key not in known:
            problems.add(f"{key!r} is no option of {name}.{did_you_mean(key, known)} See `afina methods {name}`.")
        elif key in values:
            problems.add(f"{key} is given twice")
        else:
            try:
                values[key] = parse_value(text.strip(), hints[key], several=key in LISTS)
            except ValueError as error:
                problems.add(f"{word}: {error}")
    return values
