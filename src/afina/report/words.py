"""How figures are said in a report."""

from __future__ import annotations

__all__ = ["counted", "duration", "percent", "size"]


def percent(share: float, digits: int = 1) -> str:
    """`95.5 %`; only all is 100 %, and only nothing is 0 %."""
    said = round(100 * share, digits)
    smallest = 10.0**-digits
    if share > 0 and said <= 0:
        return f"<{smallest:.{digits}f} %"
    if share < 1 and said >= 100:
        return f">{100 - smallest:.{digits}f} %"
    return f"{said:.{digits}f} %"


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """`31 s`, `2 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes, in units a person reads."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
