"""What was found in the data: dropped rows, conflicts, imbalance, truncation. Lines are those of the data file."""

from __future__ import annotations

from typing import Any

from afina.errors import shortened
from afina.report.folder import RunFolder
from afina.report.history import definitions
from afina.report.markup import Markup, Node, cut, el
from afina.report.words import counted, percent

__all__ = ["findings"]

_DROPPED = {
    "empty_texts": "dropped: the text is empty",
    "missing_labels": "dropped: the label is missing",
    "duplicates": "dropped: the same text with the same label is there already",
    "conflicting_labels": "dropped: the same text stands under different labels, and nobody can say which is right",
}
_UNEVEN = 5  # times as many rows in the commonest class as in the rarest


def findings(run: RunFolder) -> Markup:
    """Sentences, each with its number and lines."""
    data = run.data
    found: list[Node] = []
    for key, what in _DROPPED.items():
        if lines := data.get(key) or []:
            found.append(f"{counted(len(lines), 'row')} {what} (line {shortened(lines, 8)})")
    if near := data.get("near_duplicates") or []:
        rows = sum(len(group) for group in near)
        groups = counted(len(near), "group")
        found.append(f"{counted(rows, 'row')} in {groups} say nearly the same; each group is on one side of the split")
    repaired = data.get("repaired_labels") or {}
    for written, read in list(repaired.items())[:10]:
        found.append(["label “", written, "” is read as “", read, "”"])
    if len(repaired) > 10:
        found.append(f"{len(repaired) - 10} more labels are read in another spelling")
    if truncated := data.get("truncated", 0):
        share = truncated / max(1, data["kept"])
        found.append(f"{counted(truncated, 'text')} ({percent(share)}) were cut off after {data.get('max_length')} tokens")
    counts: dict[str, int] = data["classes"]
    most, least = (choose(counts, key=counts.__getitem__, default="") for choose in (max, min))
    if counts and counts[most] >= _UNEVEN * counts[least]:
        found.append(
            f"The classes are uneven: “{cut(most)}” has {counts[most]:,} rows, “{cut(least)}” {counts[least]:,}. Accuracy "
            "says little of the rare classes; look at macro F1 and at recall"
        )
    tested = run.data["splits"].get("test", {}).get("classes", {})
    few = [label for label in run.labels if 0 < tested.get(label, 0) < 10]
    if few:
        one = len(few) == 1
        names = shortened((f"“{cut(x, 30)}”" for x in few), 6)
        found.append(
            f"{names} {'has' if one else 'have'} fewer than 10 test rows: {'its' if one else 'their'} figures are rough"
        )
    listed: Node = el("ul", *(el("li", *_nodes(node)) for node in found), class_="found")
    if not found:
        listed = el("p", "Nothing was dropped, repaired or cut off, and the classes are of like size.")
    recipe = run.recipe["data"]
    pairs: list[tuple[str, Node]] = [
        ("file", str(data.get("file") or recipe.get("file", ""))),
        ("columns", ", ".join(f"{role.replace('_', ' ')} “{cut(name)}”" for role, name in data["columns"].items())),
        ("rows", f"{data['rows']:,} read, {data['kept']:,} used"),
    ]
    return el("div", definitions(pairs), listed)


def _nodes(node: Any) -> list[Node]:
    return node if isinstance(node, list) else [node]
