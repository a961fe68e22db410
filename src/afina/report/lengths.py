"""How long the rows are, in the tokens that the model reads."""

from __future__ import annotations

from afina.report.charts import bars
from afina.report.folder import RunFolder
from afina.report.markup import Markup, el

__all__ = ["lengths"]


def lengths(run: RunFolder) -> Markup | None:
    """A histogram; what was cut off is told with the data."""
    found = run.data.get("token_histogram")
    if not found or not sum(found["counts"]):
        return None
    edges, counts = found["edges"], found["counts"]
    total, reached, middle = sum(counts), 0, edges[0]
    for edge, count in zip(edges[1:], counts, strict=True):
        reached += count
        if reached * 2 >= total:
            middle = edge
            break
    quantiles = run.data.get("tokens") or {}
    longest = quantiles.get("100 %", edges[-1])
    said = f"Half of the rows have at most {quantiles.get('50 %', middle)} tokens, the longest {longest}."
    drawn = bars("Rows by their length in tokens", edges, counts, x_name="tokens of a row, as it was read", described=said)
    return el("div", el("p", said), drawn)
