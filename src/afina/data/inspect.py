"""What a person should know of the rows before a model learns from them; nothing here changes a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from afina.data.example import Example, Kind
from afina.data.giveaways import telling_columns, telling_words
from afina.data.languages import languages
from afina.data.suspects import suspected
from afina.data.table import Table

__all__ = ["inspected", "said"]

_UNEVEN = 5.0  # times as many rows in the commonest class as in the rarest
_SHARES = (0, 5, 25, 50, 75, 95, 100)


def inspected(
    examples: Sequence[Example], rows: Sequence[int], table: Table, columns: Mapping[str, str], kind: Kind, seed: int,
    *, suspects: bool,
) -> dict[str, Any]:  # fmt: skip
    """Lengths, languages, imbalance, words and columns that give the label away, and rows whose label may be wrong.

    `rows` are numbers of the rows of the table that the examples were made of. Of pictures and recordings, only imbalance.
    """
    labels = kind.labels
    if not kind.of_text:
        return {"imbalance": _imbalance(examples) if labels == "class" else None}
    lengths = sorted(len(e.text.split()) for e in examples)
    found: dict[str, Any] = {
        "words": {f"{share} %": lengths[(len(lengths) - 1) * share // 100] for share in _SHARES},
        "languages": languages([e.text for e in examples]),
        "imbalance": None,
        "telling_words": [],
        "telling_columns": telling_columns(
            table, columns, rows, [e.label for e in examples] if labels == "class" else None
        ),
        "suspects": None,
    }  # fmt: skip
    if labels == "class":
        found["imbalance"] = _imbalance(examples)
        found["telling_words"] = telling_words(examples)
        if suspects:
            found["suspects"] = asdict(suspected(examples, seed))
    return found


def _imbalance(examples: Sequence[Example]) -> dict[str, Any]:
    counts = Counter(e.label for e in examples)
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    return {"ratio": round(counts[most] / counts[least], 2), "most": most, "least": least}


def said(found: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that calls for a look."""
    lines = []
    if (uneven := found.get("imbalance")) and uneven["ratio"] >= _UNEVEN:
        lines.append(
            f"classes are uneven: {uneven['ratio']:g} rows of {uneven['most']!r} to one of {uneven['least']!r}; look at "
            "macro F1, and see data.balance"
        )
    spoken = {name: share for name, share in (found.get("languages") or {}).items() if name != "other"}
    if len(spoken) > 1:
        lines.append("languages: " + ", ".join(f"{name} {share:.0%}" for name, share in spoken.items()))
    for column in found.get("telling_columns") or []:
        used = f" and is used as {column['role']}" if column["role"] else "; keep it out of the input"
        lines.append(f"column {column['column']!r} {column['what']}{used}")
    if words := found.get("telling_words"):
        shown = ", ".join(f"{w['words']!r} ({w['rows']} of {w['of']} are {w['label']!r})" for w in words[:3])
        more = f" and {len(words) - 3} more" if len(words) > 3 else ""
        lines.append(f"words that alone give the label away: {shown}{more}")
    if suspects := found.get("suspects"):
        if suspects["left_out"]:
            lines.append(f"labels that may be wrong: {suspects['left_out']}")
        elif suspects["count"]:
            rows = ", ".join(f"{row['line']} ({row['label']!r}, rather {row['likely']!r})" for row in suspects["rows"][:3])
            more = f" and {suspects['count'] - 3} more" if suspects["count"] > 3 else ""
            lines.append(f"labels that may be wrong: line {rows}{more}; all rows stay, see the report")
    return lines
