"""`afina compare`: runs side by side, and whether their difference is more than chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from afina.cli.show import console, heading, table

__all__ = ["compare"]

_CHANCE = 0.05
_OFF = ("-", False, 0.0, "none", True)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two or more runs.", metavar="RUN RUN ...")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Put runs side by side: what differs in their recipes, what they cost, how they answer the test rows."""
    from afina.errors import ConfigError
    from afina.report.comparison import compare_runs

    if len(runs) < 2:
        raise ConfigError(f"afina compare needs at least two runs and got {len(runs)}: afina compare RUN RUN ...")
    if twice := sorted({str(r) for r in runs if [x.resolve() for x in runs].count(r.resolve()) > 1}):
        raise ConfigError(f"afina compare: the same run is named more than once: {', '.join(twice)}")
    found = compare_runs(runs)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    show(found)


def show(found: dict[str, Any]) -> None:
    """The table, and a sentence for each pair."""
    from afina.report.folder import Shown
    from afina.report.words import duration, size

    made, names = found["runs"], [run["run"] for run in found["runs"]]
    rows: list[list[Any]] = [["model", *(r["model"] for r in made)], ["method", *(r["method"] for r in made)]]
    for key, values in found["differing"].items():
        if "-" in values and all(value in _OFF for value in values):
            continue  # an option of one method that is off says nothing
        rows.append([key.removeprefix("method.").removeprefix("training."), *(_short(value) for value in values)])
    rows += [
        ["trainable parameters", *(f"{r['trainable_parameters']:,}" for r in made)],
        ["adapter", *(size(r["adapter_bytes"]) for r in made)],
        ["training", *(duration(r["seconds"]) for r in made)],
        ["test rows", *(f"{r['test_rows']:,}" for r in made)],
    ]
    if all(r["wrong"] is not None for r in made):
        rows.append(["not right", *(f"{r['wrong']:,}" for r in made)])
    for key, said in found["shown"].items():
        figure = Shown(**said)
        rows.append([figure.title, *(figure.said(r["figures"].get(key)) for r in made)])
        if any(key in r["intervals"] for r in made):
            ends = [" to ".join(map(figure.said, r["intervals"][key])) if key in r["intervals"] else "-" for r in made]
            rows.append(["  95 % interval", *ends])
    table(["", *names], rows)
    heading("More than chance?")
    for pair in found["pairs"]:
        console().print(f"  {pair['first']} and {pair['second']}: {_verdict(pair)}", markup=False)
    if sum(pair["same_test_rows"] for pair in found["pairs"]) > 1:
        count = len(found["pairs"])
        console().print(f"  Among {count} pairs, p below {_CHANCE / count:.2g} is the fair bar (Bonferroni).", markup=False)


def _verdict(pair: dict[str, Any]) -> str:
    if not pair["same_test_rows"]:
        return (
            f"their test rows differ ({pair['shared_rows']:,} are shared), so their scores cannot be compared. Train both "
            "on the same file with the same seed and shares"
        )
    if "p" not in pair:
        return "the same test rows; rows of this task have no score of their own, so the figures above are all there is"
    said = "more than chance would give" if (p := pair["p"]) < _CHANCE else "no more than chance may give"
    if "difference" in pair:
        gap = pair["difference"]
        if gap == 0:
            return f"by {pair['scored']}, the same on average"
        better = f"the {'first' if gap > 0 else 'second'} is better by {abs(gap):.3g}"
        return f"by {pair['scored']}, {better} on average; p = {p:.2g} (sign flips): {said}"
    first, second = pair["only_first"], pair["only_second"]
    if first == second == 0:
        return "the same test rows are right and wrong"
    return f"{first:,} rows only the first has right, {second:,} only the second; p = {p:.2g} (McNemar, exact): {said}"


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
