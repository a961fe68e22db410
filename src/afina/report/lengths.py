"""How long the rows are, in the tokens that the model reads."""

from __future__ import annotations

from afina.report.charts import bars
from afina.report.folder import RunFolder
from afina.report.markup import Markup, el
from afina.report.words import counted, percent

__all__ = ["lengths"]


def lengths(run: RunFolder) -> Markup | None:
    """A histogram, and what was cut off."""
    found, limit = run.data.get("token_histogram"), run.data.get("max_length")
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
    cut_off = run.data.get("truncated", 0)
    if cut_off:
        share = cut_off / max(1, run.data["kept"])
        said += f" {counted(cut_off, 'row')} ({percent(share)}) longer than {limit} tokens were cut off there."
    drawn = bars("Rows by their length in tokens", edges, counts, x_name="tokens of a row, as it was read", described=said)
    return el("div", el("p", said), drawn)
