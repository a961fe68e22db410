"""Every exception afina raises on purpose.

    AfinaError                    anything the user can mend; the command line prints it without a traceback
    ├── ConfigError               an option or a configuration file is wrong            (also a ValueError)
    ├── TargetError               a requested target matches nothing or cannot be adapted (also a ValueError)
    ├── AdapterNameError          an adapter name is unknown or taken                   (also a ValueError)
    ├── AlreadyAdaptedError       the model already carries adapters                    (also a ValueError)
    ├── CheckpointError           an adapter file does not fit, is broken or incomplete (also a ValueError)
    │   └── BaseMismatchError     the adapter was trained on another base model
    ├── MergeError                an adapter cannot be merged, or was merged already    (also a ValueError)
    ├── DataError                 the user's file cannot be used as asked               (also a ValueError)
    ├── TrainingError             a run would teach the model nothing, or has gone wrong (also a RuntimeError)
    │   ├── LostProcessError      another process of the run has ended, which says why itself
    │   └── StoppedError          a run was asked to stop and has written a checkpoint
    └── MissingDependencyError    an optional library is not installed                  (also an ImportError)

A message names what was typed, what was found, what was expected, the nearest match and the cure. Problems that can be
found together are raised together: see `Problems`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterNameError",
    "AfinaError",
    "AlreadyAdaptedError",
    "BaseMismatchError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LostProcessError",
    "MergeError",
    "MissingDependencyError",
    "Problems",
    "StoppedError",
    "TargetError",
    "TrainingError",
    "did_you_mean",
    "shortened",
]


class AfinaError(Exception):
    """Base of every exception in this file."""


class ConfigError(AfinaError, ValueError):
    """An option or a configuration file is wrong."""


class TargetError(AfinaError, ValueError):
    """A requested target matches nothing or cannot be adapted."""


class AdapterNameError(AfinaError, ValueError):
    """An adapter name is unknown or taken."""


class AlreadyAdaptedError(AfinaError, ValueError):
    """The model already carries adapters; wrapping it again would throw them away."""


class CheckpointError(AfinaError, ValueError):
    """An adapter file does not fit the model, is broken or incomplete."""


class BaseMismatchError(CheckpointError):
    """The adapter was trained on another base model."""


class MergeError(AfinaError, ValueError):
    """An adapter cannot be merged into the layer it adapts."""


class DataError(AfinaError, ValueError):
    """The user's file cannot be used as asked."""


class TrainingError(AfinaError, RuntimeError):
    """A run would teach the model nothing, or has gone wrong."""


class LostProcessError(TrainingError):
    """Another process of the run has ended; `told`: it has said why, so that nothing is left to say here."""

    def __init__(self, message: str, *, told: bool = False):
        super().__init__(message)
        self.told = told


class StoppedError(TrainingError):
    """A run was asked to stop, by Ctrl-C or SIGTERM, and has written a checkpoint; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class MissingDependencyError(AfinaError, ImportError):
    """An optional library is not installed; the message holds the exact install command."""

    def __init__(self, library: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {library}, which is not installed. Run: pip install 'afina[{extra}]'")


class Problems:
    """Collects problems and raises them together.

    >>> problems = Problems("LoraConfig")
    >>> problems.add("r=0: expected a whole number of at least 1")
    >>> problems.raise_as(ConfigError)
    Traceback (most recent call last):
    afina.errors.ConfigError: LoraConfig: r=0: expected a whole number of at least 1
    """

    def __init__(self, subject: str):
        self.subject = subject
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Note one problem; nothing is raised yet."""
        self.found.append(problem)

    def raise_as(self, error: type[AfinaError], cure: str = "") -> None:
        """Raise `error` with everything found, and what to do about it all; do nothing when nothing was found."""
        after = f"\n{cure}" if cure else ""
        if len(self.found) == 1:
            raise error(f"{self.subject}: {self.found[0]}{after}")
        if self.found:
            listed = ["  - " + problem.replace("\n", "\n    ") for problem in self.found]
            raise error(f"{self.subject}: {len(self.found)} problems\n" + "\n".join(listed) + after)


def did_you_mean(typed: str, known: Iterable[str], *, count: int = 3) -> str:
    """A sentence with the nearest known names, or with all of them when they are few; empty when none is known."""
    names = sorted({str(name) for name in known})
    near = difflib.get_close_matches(str(typed), names, n=count, cutoff=0.5)
    if not near:
        lowered = str(typed).lower()
        near = [name for name in names if lowered in name.lower() or name.lower() in lowered][:count]
    if near:
        return f" Did you mean {' or '.join(repr(name) for name in near)}?"
    return f" Known: {shortened(names)}." if names else ""


def shortened(names: Iterable[object], limit: int = 8) -> str:
    """`a, b, c` with at most `limit` names and a count of the rest."""
    listed = [str(name) for name in names]
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")
