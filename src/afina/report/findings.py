"""What was found in the data: dropped rows, conflicts, imbalance, lengths, words that give the label away, labels that may
be wrong. Lines are those of the data file."""

from __future__ import annotations

from typing import Any

from afina.errors import shortened
from afina.report.folder import RunFolder
from afina.report.history import definitions
from afina.report.lengths import unit_of
from afina.report.markup import Markup, Node, cut, el, table
from afina.report.words import counted, percent

__all__ = ["findings"]

_DROPPED = {
    "repaired_texts": "repaired: letters were read in a wrong encoding, or are control characters",
    "white_space": "repaired: runs of white space",
    "broken_files": "left out: the text cannot be read",
    "empty_texts": "dropped: the text is empty",
    "missing_labels": "dropped: the label is missing",
    "too_short": "dropped: too few letters",
    "duplicates": "dropped: the same text with the same label is there already",
    "conflicting_labels": "dropped: the same text stands under different labels, and nobody can say which is right",
    "near_dropped": "dropped: nearly the same text is there already",
    "leaks": "dropped: nearly the same text, or one of the same group, is on the test or validation side",
    "left_out": "left out, so that classes are of one size",
}
_SPLITS = {
    "stratified": "by chance, with the share of each class on every side",
    "grouped": "by chance, with all rows of a group on one side",
    "time": "by time: the earliest rows train, the latest test",
    "given": "as files or a column say",
    "none held out": "not at all: every row is learned from",
}
_LISTED = 12  # rows of a table
_UNEVEN = 5  # times as many rows in the commonest class as in the rarest


def findings(run: RunFolder) -> Markup:
    """Sentences, each with its number and lines."""
    data = run.data
    found: list[Node] = list(data.get("notes") or [])
    found += data.get("files") or []
    for key, what in _DROPPED.items():
        what = what.replace("the text", f"the {run.what}").replace("same text", f"same {run.what}")
        if run.what != "text":
            what = what.replace("nearly the same", "the same")
        if lines := data.get(key) or []:
            found.append(f"{counted(len(lines), 'row')} {what} (line {shortened(lines, 8)})")
    for why, lines in (data.get("unusable") or {}).items():
        found.append(f"{counted(len(lines), 'row')} dropped: {why} (line {shortened(lines, 8)})")
    if near := data.get("near_duplicates") or []:
        rows = sum(len(group) for group in near)
        groups = counted(len(near), "group")
        found.append(f"{counted(rows, 'row')} in {groups} say nearly the same; each group is on one side of the split")
    repaired = data.get("repaired_labels") or {}
    for written, read in list(repaired.items())[:10]:
        found.append(["label “", written, "” is read as “", read, "”"])
    if len(repaired) > 10:
        found.append(f"{len(repaired) - 10} more labels are read in another spelling")
    if repeated := data.get("repeated"):
        found.append(f"{counted(repeated, 'training row')} repeated, so that classes are of one size")
    if truncated := data.get("truncated", 0):
        share = truncated / max(1, data["kept"])
        where = f"after {length} tokens" if (length := data.get("max_length")) is not None else "at their end"
        found.append(f"{counted(truncated, run.what)} ({percent(share)}) were cut off {where}")
    counts: dict[str, int] = data["classes"]
    most, least = (choose(counts, key=counts.__getitem__, default="") for choose in (max, min))
    if counts and counts[most] >= _UNEVEN * counts[least]:
        found.append(
            f"The classes are uneven: “{cut(most)}” has {counts[most]:,} rows, “{cut(least)}” {counts[least]:,}. Accuracy "
            "says little of the rare classes; look at macro F1 and at recall"
        )
    found += _of_columns(data)
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
    if split := _SPLITS.get(data.get("split", "")):
        pairs.append(("divided", split))
    unit, scale = unit_of(run)
    for key, name, divisor in (("words", "words a text", 1), ("tokens", f"{unit} a row", scale)):
        if shares := data.get(key):
            said = ((share, f"{value:,}" if divisor == 1 else f"{value / divisor:.2f}") for share, value in shares.items())
            pairs.append((name, ", ".join(f"{value} at {share}" for share, value in said)))
    if spoken := data.get("languages"):
        pairs.append(("languages", ", ".join(f"{name} {percent(share, 0)}" for name, share in spoken.items())))
    if weights := data.get("class_weights"):
        pairs.append(("class weights", ", ".join(f"“{cut(k, 30)}” {v:.3g}" for k, v in list(weights.items())[:_LISTED])))
    return el("div", definitions(pairs), listed, _telling(data), _suspects(data))


def _of_columns(data: dict[str, Any]) -> list[Node]:
    lines: list[Node] = []
    for column in data.get("telling_columns") or []:
        used = f", and is used as {column['role']}" if column["role"] else ""
        lines.append(["column “", cut(column["column"]), "” ", column["what"], used])
    return lines


def _telling(data: dict[str, Any]) -> Node:
    words = (data.get("telling_words") or [])[:_LISTED]
    if not words:
        return None
    rows = [(w["words"], cut(w["label"]), f"{w['rows']:,} of {w['of']:,}", percent(w["of_class"])) for w in words]
    head = ["words", "class", "texts of it", "of the class"]
    title = "Words that alone give the label away: what the class is about, or a trace of how rows were gathered?"
    return table(title, head, rows, numbers=(2, 3))


def _suspects(data: dict[str, Any]) -> Node:
    suspects = data.get("suspects") or {}
    if suspects.get("left_out"):
        return el("p", f"Labels that may be wrong: {suspects['left_out']}.")
    if not suspects.get("rows"):
        return None
    rows = [
        (str(row["line"]), cut(row["label"], 40), cut(row["likely"], 40), cut(row["text"], 160))
        for row in suspects["rows"][:_LISTED]
    ]
    shown = f"the first {len(rows)} of {suspects['count']:,}" if suspects["count"] > len(rows) else "all of them"
    title = f"Labels that may be wrong, by words alone ({shown}; no row was dropped)"
    return table(title, ["line", "label", "rather", "text"], rows)


def _nodes(node: Any) -> list[Node]:
    return node if isinstance(node, list) else [node]
