"""Reads a column of times, all in one form: ISO dates, numbers, and the forms people write dates in.

Day and month are told apart by all rows together; where that cannot be done, it is an error and not a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from afina.errors import DataError

__all__ = ["read_times"]

_DATES = (
    "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y/%m/%d", "%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y",
)  # fmt: skip
_CLOCKS = ("", " %H:%M", " %H:%M:%S", ", %H:%M", " %I:%M %p")
_TOLD = 5
_SAMPLE = 200


def read_times(values: Sequence[str], places: Sequence[int | str], column: str) -> list[float]:
    """Seconds, or the numbers themselves, in the order of the values. Raises DataError naming rows that cannot be read."""
    best: list[float | None] = [None] * len(values)
    fitting: list[tuple[str, list[float]]] = []
    sample = values[:_SAMPLE]
    for name, parse in _forms():
        if 2 * sum(_tried(parse, value) is not None for value in sample) < len(sample):
            continue  # few of them fit: not worth trying on all
        read = [_tried(parse, value) for value in values]
        if all(number is not None for number in read):
            fitting.append((name, [number for number in read if number is not None]))
        elif sum(n is not None for n in read) > sum(n is not None for n in best):
            best = read
    if fitting:
        name, times = fitting[0]
        order = sorted(range(len(times)), key=times.__getitem__)
        for other, others in fitting[1:]:
            if [others[i] for i in order] != sorted(others):
                raise DataError(
                    f"data.time: column {column!r} may be read as {name} or as {other}, for example {values[0]!r}, and the "
                    "rows do not tell which; write the dates as 2026-01-31"
                )
        return times
    wrong = [i for i, number in enumerate(best) if number is None]
    named = ", ".join(f"line {places[i]}: {values[i][:30]!r}" for i in wrong[:_TOLD])
    rest = f" and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
    raise DataError(
        f"data.time: column {column!r} holds {len(wrong)} value{'s' if len(wrong) > 1 else ''} that cannot be read as a "
        f"time ({named}{rest}); write 2026-01-31, 2026-01-31T12:30:00 or a number, the same form in all rows"
    )


def _forms() -> list[tuple[str, Callable[[str], float]]]:
    forms: list[tuple[str, Callable[[str], float]]] = []
    forms += [("a number", _number), ("an ISO date", _iso), ("a mail's date", _mail)]
    for date in _DATES:
        forms.append((_shown(date), lambda text, date=date: _dated(text, date)))  # type: ignore[misc]
    return forms


def _shown(date: str) -> str:
    for letter, word in (("%d", "day"), ("%m", "month"), ("%Y", "year"), ("%b", "month"), ("%B", "month")):
        date = date.replace(letter, word)
    return date


def _tried(parse: Callable[[str], float], value: str) -> float | None:
    try:
        return parse(value.strip())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _iso(text: str) -> float:
    return _seconds(datetime.fromisoformat(text))


def _mail(text: str) -> float:
    return _seconds(parsedate_to_datetime(text))


def _dated(text: str, date: str) -> float:
    for clock in _CLOCKS:
        try:
            return _seconds(datetime.strptime(text, date + clock))
        except ValueError:
            continue
    raise ValueError


def _seconds(moment: datetime) -> float:
    """A moment without a zone counts as UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
