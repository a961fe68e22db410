"""How long the rows are: in the tokens that the model reads, or of recordings in seconds."""

from __future__ import annotations

from afina.report.charts import bars
from afina.report.folder import RunFolder
from afina.report.markup import Markup, el

__all__ = ["lengths", "unit_of"]


def unit_of(run: RunFolder) -> tuple[str, int]:
    """What lengths are told in, and how many of what was counted make one of it."""
    rate = run.data.get("rate")  # samples a second
    return ("seconds", rate) if rate else (run.data.get("unit", "tokens"), 1)


def lengths(run: RunFolder) -> Markup | None:
    """A histogram; what was cut off is told with the data."""
    found = run.data.get("token_histogram")
    if not found or not sum(found["counts"]):
        return None
    unit, scale = unit_of(run)
    edges, counts = [edge / scale if scale > 1 else edge for edge in found["edges"]], found["counts"]
    total, reached, middle = sum(counts), 0, edges[0]
    for edge, count in zip(edges[1:], counts, strict=True):
        reached += count
        if reached * 2 >= total:
            middle = edge
            break
    quantiles = run.data.get("tokens") or {}
    half, longest = (quantiles.get(share, end * scale) / scale for share, end in (("50 %", middle), ("100 %", edges[-1])))
    form = ".2f" if scale > 1 else ",.0f"
    said = f"Half of the rows have at most {half:{form}} {unit}, the longest {longest:{form}}."
    drawn = bars(f"Rows by their length in {unit}", edges, counts, x_name=f"{unit} of a row, as it was read", described=said)
    return el("div", el("p", said), drawn)
