"""Amounts of memory, as people write them and as they are shown."""

from __future__ import annotations

import re

from afina.errors import ConfigError

__all__ = ["parse_size", "shown_size"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SHORT = {"k": "kib", "m": "mib", "g": "gib", "t": "tib"}  # as other tools mean a bare letter


def parse_size(text: str | int | float) -> int:
    """Bytes of `11GB` (10^9), `11GiB` or `11G` (2^30), `500 MB`, `2.5gb`. Raises ConfigError saying what is expected."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    unit = found[2].lower() if found else ""
    unit = _SHORT.get(unit, unit)
    if found is None or unit not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(f"{text!r} is no amount of memory; expected a number and a unit, for example 11GB, 500MB or 16GiB")
    amount = int(float(found[1]) * _UNITS[unit])
    if unit == "" and amount < 10**6:
        raise ConfigError(f"{text!r} is {amount} bytes; did you mean {text}GB?")
    return amount


def shown_size(amount: float) -> str:
    """`9.8 GB`, `512 MB`: units of 10^9 and 10^6 bytes, as cards are sold and limits are written."""
    if abs(amount) >= 99.5e6:
        return f"{amount / 1e9:,.2f} GB" if abs(amount) < 99.5e9 else f"{amount / 1e9:,.0f} GB"
    return f"{amount / 1e6:,.1f} MB" if abs(amount) >= 1e6 else f"{amount / 1e3:,.0f} kB"
