"""What was trained on what, how it went, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from afina.report.charts import Line, chart, smoothed, thinned
from afina.report.folder import RunFolder
from afina.report.markup import Markup, Node, cut, el, table
from afina.report.words import counted, duration, percent, size

__all__ = ["cost", "curves", "definitions", "trained"]

_MANY = 20
_MOST = 200
_STYLES = ("a", "b", "c", "d")


def definitions(pairs: Sequence[tuple[str, Node]]) -> Markup:
    """Names and what they are."""
    return el("dl", *(node for name, said in pairs for node in (el("dt", name), el("dd", said))))


def trained(run: RunFolder) -> Markup:
    """Model, method, sizes, and the rows of each side of the split."""
    recipe, train = run.recipe, run.metrics["train"]
    method = {k: v for k, v in recipe["method"].items() if k != "name"}
    said = {k: v for k, v in method.items() if v not in (False, 0.0, None, "none", [], {}) and v is not True}
    options = ", ".join(f"{k}={cut(', '.join(map(str, v)) if isinstance(v, list) else v, 80)}" for k, v in said.items())
    share = train["trainable_parameters"] / max(1, train["total_parameters"])
    settings = recipe["training"]
    best = settings.get("best") or next(iter(run.figures))
    task = {k: v for k, v in run.metrics["task"].get("options", {}).items() if v not in (None, "", False)}
    keys = ("epochs", "batch_size", "learning_rate", "max_length", "seed")
    shown = {k: settings[k] for k in keys if settings.get(k) is not None}
    base = run.adapter.get("base_model_name_or_path")
    name = f"{recipe['model']} ({base})" if base and base != recipe["model"] else recipe["model"]
    splits = run.data["splits"]
    classes = [c for c in run.labels if any(c in s.get("classes", {}) for s in splits.values())]
    columns = ["rows", *splits, "all"]
    rows: list[list[Any]] = [
        [cut(label), *(f"{s['classes'].get(label, 0):,}" for s in splits.values()),
         f"{sum(s['classes'].get(label, 0) for s in splits.values()):,}"]
        for label in classes
    ]  # fmt: skip
    total = ["all", *(f"{s['rows']:,}" for s in splits.values()), f"{sum(s['rows'] for s in splits.values()):,}"]
    numbers = range(1, len(columns))
    caption = "Rows of each class on each side of the split"
    if not rows:
        counts = table("Rows on each side of the split", columns, [total], numbers=numbers)
    elif len(rows) > _MANY:
        left = f", the first {_MOST} of {len(rows)} classes" if len(rows) > _MOST else ""
        every = table(caption + left, columns, rows[:_MOST], numbers=numbers)
        counts = el("div", table("Rows on each side of the split", columns, [total], numbers=numbers),
                    el("details", el("summary", f"Rows of each of the {len(rows)} classes"), every))  # fmt: skip
    else:
        counts = table(caption, columns, [*rows, total], numbers=numbers)
    return el(
        "div",
        definitions(
            [
                ("task", ", ".join([run.task.replace("_", " "), *(f"{k}={cut(v, 40)}" for k, v in task.items())])),
                ("model", name),
                ("method", f"{recipe['method']['name']}{': ' if options else ''}{options}"),
                (
                    "trained",
                    f"{train['trainable_parameters']:,} of {train['total_parameters']:,} parameters ({percent(share, 2)})",
                ),
                ("adapter", f"{size(run.adapter_bytes)} on disk"),
                ("settings", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in shown.items())),
                ("kept", f"epoch {train['best_epoch']}, the best {_title(run, best)} on the validation rows"),
            ]
        ),
        counts,
    )


def curves(run: RunFolder) -> Markup:
    """Losses, validation figures and the learning rate, with the epoch that was kept."""
    steps, epochs, kept = run.steps, run.epochs, run.metrics["train"]["best_epoch"]
    best = next((e for e in epochs if e["epoch"] == kept), None)
    mark = (float(best["step"]), f"epoch {kept} kept") if best else None
    raw = [(float(s["step"]), float(s["loss"])) for s in steps]
    losses = [(float(e["step"]), float(e["validation_loss"])) for e in epochs]
    lines = [
        Line("training, each step", thinned(raw), "raw"),
        Line("training, smoothed", thinned(smoothed(raw)), "a"),
        Line("validation", losses, "b", marks=True),
    ]
    end = f"validation loss from {losses[0][1]:.3f} to {losses[-1][1]:.3f}" if losses else "no epoch was finished"
    rates = [(float(s["step"]), float(s["learning_rate"])) for s in steps if "learning_rate" in s]
    keys = [key for key in run.figures if key != "loss" and any(_there(e, key) for e in epochs)]
    rows = [
        [f"{e['epoch']}{' (kept)' if e['epoch'] == kept else ''}", f"{e.get('train_loss', float('nan')):.3f}",
         f"{e['validation_loss']:.3f}", *(run.figures[key].said(e.get(f"validation_{key}")) for key in keys)]
        for e in epochs[-_MOST:]
    ]  # fmt: skip
    columns = ["epoch", "training loss", "validation loss", *(run.figures[key].title for key in keys)]
    return el(
        "div",
        el("p", _went(epochs, kept, sure=bool(run.labels), rewarded=run.task == "grpo")),
        el(
            "div",
            chart("Loss (lower is better)", lines, described=end, mark=mark, zero=True),
            *_figures(run, keys, mark),
            *_noted(run, mark),
            chart("Learning rate", [Line("learning rate", thinned(rates), "a")], described="rises, then falls", zero=True,
                  show=lambda y: f"{y:.3g}"),
            class_="charts",
        ),
        el("details", el("summary", "The figures of each evaluation"),
           table("Figures of the validation rows after each evaluation", columns, rows, numbers=range(1, len(columns)))),
    )  # fmt: skip


def _figures(run: RunFolder, keys: Sequence[str], mark: tuple[float, str] | None) -> list[Markup]:
    """Charts of the validation figures: those between 0 and 1 together, each other one by itself."""
    lines = {key: [(float(e["step"]), float(e[f"validation_{key}"])) for e in run.epochs if _there(e, key)] for key in keys}
    shares = [k for k in keys if run.figures[k].better > 0 and all(-1 <= y <= 1 for _, y in lines[k])][: len(_STYLES)]
    drawn = []
    if shares:
        styled = zip(shares, _STYLES, strict=False)
        together = [Line(run.figures[k].title, lines[k], style, marks=True) for k, style in styled]
        title = "On the validation rows (more is better)"
        drawn.append(chart(title, together, described="see the table below", mark=mark, show=lambda y: f"{y:.3g}"))
    for key in keys:
        if key not in shares:
            shown = run.figures[key]
            title = f"{shown.title} on the validation rows ({'more' if shown.better > 0 else 'less'} is better)"
            line = Line(shown.title, lines[key], "a", marks=True)
            drawn.append(chart(title, [line], described="see the table below", mark=mark, show=lambda y: f"{y:.4g}"))
    return drawn


_NOTED = {
    "reward": "Mean reward of a step's answers", "margin": "Mean margin of a step's pairs",
    "accuracy": "Share of a step's pairs that are ranked right", "kl": "KL per token in a step",
    "length": "Tokens of a step's answers", "ended": "Share of a step's answers that end",
    "even": "Share of a step's prompts whose answers all got one reward",
}  # fmt: skip


def _noted(run: RunFolder, mark: tuple[float, str] | None) -> list[Markup]:
    """Charts of what the task noted of each step."""
    drawn = []
    for key, title in _NOTED.items():
        raw = [(float(s["step"]), float(s[key])) for s in run.steps if isinstance(s.get(key), int | float)]
        if len(raw) > 1:
            lines = [Line("each step", thinned(raw), "raw"), Line("smoothed", thinned(smoothed(raw)), "a")]
            said = f"from {raw[0][1]:.3g} to {raw[-1][1]:.3g}"
            drawn.append(chart(title, lines, described=said, mark=mark, show=lambda y: f"{y:.3g}"))
    return drawn


def _there(evaluation: dict[str, Any], key: str) -> bool:
    return isinstance(evaluation.get(f"validation_{key}"), int | float)


def _title(run: RunFolder, key: str) -> str:
    return run.figures[key].title if key in run.figures else key


def _went(epochs: Sequence[dict[str, Any]], kept: float, *, sure: bool, rewarded: bool) -> str:
    """One sentence on what the curves mean; `sure`: whether answers have probabilities; `rewarded`: whether the loss is of
    answers that the model wrote itself, so that no row can be learned by heart."""
    if not epochs:
        return "No epoch was logged."
    if rewarded:
        return f"Epoch {kept} of {len(epochs)} was kept."
    lowest = min(epochs, key=lambda e: e["validation_loss"])
    last = epochs[-1]
    if kept == last["epoch"] and len(epochs) > 1 and lowest is last:
        return f"The last of {len(epochs)} epochs was the best, and its validation loss the lowest: more epochs may help."
    if lowest is not last and last["validation_loss"] > 1.1 * lowest["validation_loss"]:
        return (
            f"The validation loss was lowest after epoch {lowest['epoch']} and rose afterwards: the model began to learn "
            f"the training rows by heart and grew too sure. Epoch {kept} was kept"
            + ("; fewer epochs give better probabilities." if sure else ".")
        )
    return f"Epoch {kept} of {len(epochs)} was kept."


def cost(run: RunFolder) -> Markup:
    """Time, speed, memory, and what it ran on."""
    train, versions = run.metrics["train"], run.metrics["versions"]
    pairs: list[tuple[str, Node]] = [("training", duration(train["seconds"]))]
    if "steps" in train:
        pairs.append(("steps", f"{train['steps']:,}"))
    if "tokens_per_second" in train:
        speed, amount, unit = train["tokens_per_second"], train.get("tokens", 0), train.get("unit", "tokens")
        if rate := run.data.get("rate"):
            speed, amount, unit = speed / rate, round(amount / rate), "seconds of sound"
        pairs.append(("speed", f"{speed:,.{0 if speed >= 10 else 1}f} {unit}/s ({amount:,} {unit})"))
    if train.get("peak_memory_bytes"):
        pairs.append(("peak memory", size(train["peak_memory_bytes"])))
    pairs += [("on the way", note) for note in train.get("notes") or []]
    if "precision" in train:
        pairs.append(("precision", f"{train['precision']}, {counted(train.get('threads', 1), 'thread')}"))
    pairs.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    return definitions(pairs)
