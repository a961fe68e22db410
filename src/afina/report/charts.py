"""Lines, points, bars and reliability diagrams as inline SVG; colours are the style sheet's, so both schemes work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from afina.report.markup import Markup, el
from afina.report.statistics import Bin, wilson

__all__ = ["Line", "bars", "chart", "reliability", "scatter", "smoothed", "thinned"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 270, 64, 14, 14, 44
_LETTER = 8.5  # pixels of a digit, at most
Point = tuple[float, float]


@dataclass
class Line:
    """One line of a chart: `style` is a class of the style sheet (a, b, c, faint), `marks` puts a dot on each point."""

    name: str
    points: Sequence[Point]
    style: str = "a"
    marks: bool = False


def smoothed(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """Means over a window around each point, of that share of all points."""
    half = max(1, round(len(points) * share / 2))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    made = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        made.append((x, (sums[high] - sums[low]) / (high - low)))
    return made


def thinned(points: Sequence[Point], most: int = 300) -> list[Point]:
    """At most `most` points, evenly taken, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    rough = (high - low) / count or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _whole(ticks: Sequence[float], values: Sequence[float]) -> list[float]:
    """Of what is counted (steps, tokens, rows) only whole numbers."""
    return [tick for tick in ticks if tick == round(tick) or any(value != round(value) for value in values)]


def _plain(value: float) -> str:
    return f"{value:.6g}"


def _frame(
    xs: Sequence[float], ys: Sequence[float], x_name: str, show: Callable[[float], str]
) -> tuple[list[Markup], Callable[[float], float], Callable[[float], float]]:
    """Grid, axes and their numbers, and where a value lies in pixels."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    x0, x1 = xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1
    y0, y1 = ys[0], ys[-1]

    def at_x(x: float) -> float:
        return round(LEFT + wide * (x - x0) / (x1 - x0), 1)

    def at_y(y: float) -> float:
        return round(TOP + high * (1 - (y - y0) / (y1 - y0)), 1)

    made = []
    for y in ys:
        made.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at_y(y), y2=at_y(y), class_="grid"))
        made.append(el("text", show(y), x=LEFT - 8, y=at_y(y) + 4, text_anchor="end"))
    for x in xs:
        if x <= x1:
            said = _plain(x)
            beyond = at_x(x) + len(said) * _LETTER / 2 > WIDTH
            place = {"x": WIDTH if beyond else at_x(x), "text_anchor": "end" if beyond else "middle"}
            made.append(el("text", said, y=HEIGHT - BOTTOM + 18, **place))
    made.append(el("text", x_name, x=LEFT + wide / 2, y=HEIGHT - 6, text_anchor="middle", class_="axis"))
    return made, at_x, at_y


def _figure(title: str, described: str, drawn: Sequence[Markup], legend: Sequence[tuple[str, str]]) -> Markup:
    keys = [
        el("li", el("svg", el("line", x1=0, x2=22, y1=5, y2=5, class_=f"line {style}"), viewBox="0 0 22 10",
                    aria_hidden="true", class_="key"), name)
        for name, style in legend
    ]  # fmt: skip
    svg = el("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}: {described}", class_="chart")
    return el("figure", el("figcaption", title), svg, el("ul", *keys, class_="keys") if keys else None)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    described: str,
    x_name: str = "step",
    show: Callable[[float], str] = _plain,
    mark: tuple[float, str] | None = None,
    zero: bool = False,
) -> Markup:
    """Lines over the same steps; `mark` is a place on the x axis and what to write there; `zero` lets the y axis start at 0.

    `described` says in words what the picture shows.
    """
    points = [p for line in lines for p in line.points if math.isfinite(p[1])]
    if not points:
        return el("figure", el("figcaption", title), el("p", "nothing was logged", class_="note"))
    low, high = min(y for _, y in points), max(y for _, y in points)
    if high == low and not zero:  # room below, as of shares there is none above 1
        low, high = (low * 0.9, high) if low > 0 else (low, high + (abs(high) or 1.0) * 0.1)
    ys = _ticks(0.0 if zero else low, high)
    last = max(x for x, _ in points)
    xs = _whole([x for x in _ticks(0, last) if x < last * 0.93] + [last], [x for x, _ in points])
    drawn, at_x, at_y = _frame(xs, ys, x_name, show)
    if mark is not None:
        x = at_x(mark[0])
        left = x > WIDTH * 0.6
        drawn.append(el("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="best"))
        place = {"x": x - 5 if left else x + 5, "y": TOP + 10, "text_anchor": "end" if left else "start"}
        drawn.append(el("text", mark[1], class_="best", **place))
    for line in lines:
        own = [p for p in line.points if math.isfinite(p[1])]
        path = " ".join(f"{at_x(x)},{at_y(y)}" for x, y in own)
        drawn.append(el("polyline", points=path, class_=f"line {line.style}"))
        if line.marks:
            drawn += [el("circle", cx=at_x(x), cy=at_y(y), r=3.5, class_=f"dot {line.style}") for x, y in own]
    return _figure(title, described, drawn, [(line.name, line.style) for line in lines])


def reliability(bins: Sequence[Bin], described: str, title: str, x_name: str) -> Markup:
    """How often answers of each confidence are right, with 95 % intervals, beside the diagonal of a model that is honest."""
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    drawn, at_x, at_y = _frame(ticks, ticks, x_name, lambda y: f"{y:.0%}")
    drawn.append(el("line", x1=at_x(0), y1=at_y(0), x2=at_x(1), y2=at_y(1), class_="line faint"))
    for b in bins:
        low, high = wilson(b.hits, b.rows)
        x, y = at_x(b.confidence), at_y(b.hits / b.rows)
        drawn.append(el("line", x1=x, x2=x, y1=at_y(low), y2=at_y(high), class_="line a thin"))
        drawn.append(el("circle", cx=x, cy=y, r=5, class_="dot a"))
    legend = [("share, 95 % interval", "a"), ("as promised", "faint")]
    return _figure(title, described, drawn, legend)


def scatter(title: str, points: Sequence[Point], *, x_name: str, y_name: str, described: str, most: int = 1500) -> Markup:
    """Points beside the diagonal on which both numbers are the same; at most `most` of them, evenly taken."""
    every = [p for p in points if all(map(math.isfinite, p))]
    if not every:
        return el("figure", el("figcaption", title), el("p", "there are no numbers to draw", class_="note"))
    shown = thinned(every, most)
    low, high = min(map(min, every)), max(map(max, every))
    ticks = _ticks(low, high if high > low else low + (abs(low) or 1.0) * 0.1)
    drawn, at_x, at_y = _frame(ticks, ticks, x_name, _plain)
    ends = {"x1": at_x(ticks[0]), "y1": at_y(ticks[0]), "x2": at_x(ticks[-1]), "y2": at_y(ticks[-1])}
    drawn.append(el("line", **ends, class_="line faint"))
    radius = 3.5 if len(shown) < 300 else 2
    drawn += [el("circle", cx=at_x(x), cy=at_y(y), r=radius, class_="dot a many") for x, y in shown]
    left = f" ({len(shown):,} of {len(every):,} rows)" if len(shown) < len(every) else ""
    return _figure(f"{title}{left}", described, drawn, [(y_name, "a"), ("both the same", "faint")])


def bars(
    title: str,
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    x_name: str,
    described: str,
    mark: float | None = None,
    marked: str = "",
) -> Markup:
    """A histogram: `counts` between neighbouring `edges`; `mark` is a place on the x axis and `marked` what it means."""
    ys = _whole(_ticks(0, max(counts, default=0) or 1), counts)
    low, high = edges[0], max(edges[-1], mark or edges[-1])
    xs = [x for x in _ticks(low, high) if low <= x <= high] or [low]
    xs = [low, *(x for x in xs if x > low + (high - low) * 0.04)]
    xs = _whole([*(x for x in xs if x < high - (high - low) * 0.04), high], edges)
    drawn, at_x, at_y = _frame(xs, ys, x_name, lambda y: f"{y:,.6g}")
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            x, y = at_x(left), at_y(count)
            width = max(1.0, round(at_x(right) - x - 1, 1))
            drawn.append(el("rect", x=x, y=y, width=width, height=round(at_y(0) - y, 1), class_="bar own"))
    if mark is not None:
        x = at_x(mark)
        drawn.append(el("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="best"))
        place = {"x": x - 5, "text_anchor": "end"} if x > WIDTH * 0.6 else {"x": x + 5, "text_anchor": "start"}
        drawn.append(el("text", marked, y=TOP + 10, class_="best", **place))
    return _figure(title, described, drawn, [])
