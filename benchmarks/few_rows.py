"""Adapters beside full fine-tuning where rows are few: 16, 64 and 256 rows a class, on two data sets.

    python benchmarks/few_rows.py --sms sms_spam.csv --clinc clinc150_imbalanced
    python benchmarks/few_rows.py --markdown docs/benchmarks.md      render what was measured last

The first writes benchmarks/results/few_rows.json, row by row, and measures nothing that is there (`--again` does).
`--choose` measures instead what learning rates give on the validation rows; those of full fine-tuning were chosen by it.

Data: the SMS Spam Collection as CSV (text, label), and CLINC150 in its imbalanced form as a folder of train.csv, val.csv
and test.csv. Test and validation rows are the same for every way, size and seed; a seed draws the rows to train on.
Every way takes the same steps over the same rows, and the weights of the last step are kept, so that nothing but the
learning rate was chosen with rows beyond the few. Steps are few, to bound the work: neither way is trained to its end.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from classifier import adapted, full, mean_and_spread, prepared, quiet
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "few_rows.json"
PACKAGES = ("afina", "torch", "transformers", "accelerate")
SIZES, SEEDS = (16, 64, 256), (0, 1, 2)  # rows a class
VALIDATION_A_CLASS = {"sms_spam": 50, "clinc150_imbalanced": 2}
TEST_A_CLASS = {"clinc150_imbalanced": 10}  # of 30; of the other set all
Pair = tuple[str, str]  # text, label


@dataclass(frozen=True)
class DataSet:
    """How many steps of how many rows a data set is trained for, and what the models are judged by."""

    title: str
    steps: int
    batch_size: int


@dataclass(frozen=True)
class Way:
    """A row of the table: a method, or None for every weight; its learning rate for each data set, None for the default."""

    title: str
    method: str | None
    rates: Mapping[str, float | None]


DATA_SETS = {
    "sms_spam": DataSet("SMS spam, 2 classes", 80, 16),
    "clinc150_imbalanced": DataSet("CLINC150, 150 intents of 25 to 100 rows", 250, 32),
}
DEFAULT: dict[str, float | None] = dict.fromkeys(DATA_SETS)
WAYS = {
    "lora": Way("LoRA, r=8, all linear layers", "lora", {"sms_spam": None, "clinc150_imbalanced": 4e-3}),
    "full": Way("every weight", None, {"sms_spam": 5e-5, "clinc150_imbalanced": 4e-4}),
    "bitfit": Way("BitFit, all defaults", "bitfit", DEFAULT),
    "last_layers": Way("last layers, all defaults", "last_layers", DEFAULT),
}
RATES = {  # that --choose compares
    ("sms_spam", "full"): (5e-5, 1e-4, 2e-4),
    ("clinc150_imbalanced", "full"): (2e-4, 4e-4, 8e-4),
    ("clinc150_imbalanced", "lora"): (1e-3, 2e-3, 4e-3, 8e-3),
}


def sides_of_sms(file: Path, model: str = "minilm") -> dict[str, list[Pair]]:
    """The leak-free split of seed 0 that afina makes of the file."""
    run = prepared(file, 0, model=model)
    return {side: [(e.text, e.label) for e in rows.examples] for side, rows in run.rows.items()}


def sides_of_clinc(folder: Path) -> dict[str, list[Pair]]:
    """The sides as they were published."""
    sides = {}
    for side, name in (("train", "train.csv"), ("validation", "val.csv"), ("test", "test.csv")):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            sides[side] = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    return sides


def drawn(rows: Iterable[Pair], per_class: int, seed: int) -> list[Pair]:
    """At most so many rows of each class, chosen by the seed; a smaller draw is part of a larger one."""
    by_class: dict[str, list[Pair]] = {}
    for row in rows:
        by_class.setdefault(row[1], []).append(row)
    chosen = []
    for label in sorted(by_class):
        chosen += random.Random(f"{seed}/{label}").sample(by_class[label], len(by_class[label]))[:per_class]
    return chosen


def write_sides(folder: Path, sides: Mapping[str, Sequence[Pair]]) -> None:
    """A folder with a file for each side."""
    for side, rows in sides.items():
        with (folder / f"{side}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])


def measure_one(
    sides: Mapping[str, Sequence[Pair]], name: str, way: Way, rows: int, seed: int, *,
    rate: float | None = None, side: str = "test", steps: int | None = None, model: str = "minilm",
) -> dict[str, Any]:  # fmt: skip
    """Train one way on the rows of one draw, and read `side`."""
    data = DATA_SETS[name]
    train = drawn(sides["train"], rows, seed)
    few = {side: drawn(sides[side], counts.get(name, len(sides[side])), 0)
           for side, counts in (("validation", VALIDATION_A_CLASS), ("test", TEST_A_CLASS))} | {"train": train}  # fmt: skip
    epochs = max(1, round((steps or data.steps) / -(-len(train) // data.batch_size)))
    with tempfile.TemporaryDirectory() as folder:
        write_sides(Path(folder), few)
        run = prepared(
            Path(folder), seed, way.method or "lora", model, epochs=epochs, evaluate_every=float(epochs),
            batch_size=data.batch_size, learning_rate=rate or way.rates[name],
        )  # fmt: skip
    result = adapted(run, side) if way.method else full(run, rate or float(way.rates[name] or 0), side)
    used = len(run.rows["train"].examples)
    return {"train_rows": used, "epochs": epochs, "learning_rate": rate or run.recipe.training.learning_rate, **result}


def measure(
    sides: Mapping[str, Mapping[str, Sequence[Pair]]], ways: Sequence[str], seeds: Sequence[int], path: Path,
    results: dict[str, Any], *, choose: bool = False, sizes: Sequence[int] = SIZES, **extra: Any,
) -> None:  # fmt: skip
    """Fill in what is not there yet, seeds outermost, so that what is there is always whole tables."""
    kind = "chosen" if choose else "rows"
    rows = results.setdefault(kind, [])
    for seed in seeds:
        for way in ways:
            for name in sides:
                for size in sizes:
                    for rate in RATES[name, way] if choose else (None,):
                        key = {"data": name, "way": way, "a_class": size, "seed": seed, **({"rate": rate} if choose else {})}
                        if any(key.items() <= row.items() for row in rows):
                            continue
                        side = "validation" if choose else "test"
                        row = key | measure_one(sides[name], name, WAYS[way], size, seed, rate=rate, side=side, **extra)
                        if len(row["f1"]) > 2:
                            del row["f1"]
                        rows.append(row)
                        write_json(path, results)
                        print(json.dumps(row), flush=True)


def render(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    where, rows = results["about"], results["rows"]
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    text = [
        f"Measured on {where['date']}: {where['cpu']}, {where['threads']} thread(s), Python {where['python']}; {versions}.",
        "Macro F1 and accuracy on the test rows: mean of the seeds ± half of their range. `stored` is the file that keeps "
        "the result, `time` the process CPU time of training over that of training every weight.",
    ]
    for name, data in DATA_SETS.items():
        own = [row for row in rows if row["data"] == name]
        if not own:
            continue
        text.append(f"### {data.title}")
        rates = dict.fromkeys(f"{WAYS[row['way']].title}: {row['learning_rate']:g}" for row in own)
        text.append(
            f"{own[0]['rows']:,} test rows. About {data.steps} steps of {data.batch_size} rows, whatever the size (whole "
            f"epochs: {_range(own, 'steps')} steps, {_range(own, 'epochs')} epochs). Learning rates: {'; '.join(rates)}."
        )
        lines = []
        cpu = {(r["way"], r["a_class"], r["seed"]): r["cpu_s"] for r in own}
        for size in SIZES:
            for key, way in WAYS.items():
                these = [row for row in own if row["way"] == key and row["a_class"] == size]
                if not these:
                    continue
                times = [r["cpu_s"] / cpu["full", size, r["seed"]] for r in these if ("full", size, r["seed"]) in cpu]
                lines.append([
                    f"{size} a class ({_rows(these)} rows), {way.title}", len(these),
                    mean_and_spread([r["macro_f1"] for r in these]), mean_and_spread([r["accuracy"] for r in these]),
                    f"{these[0]['trained']:,}", f"{these[0]['stored_mib']:.1f}",
                    mean_and_spread(times, ".2f") if times else "",
                ])  # fmt: skip
        text.append(table(["", "seeds", "macro F1", "accuracy", "trained", "stored, MiB", "time"], lines))
    if results.get("chosen"):
        text.append(
            "Learning rates, compared with seed 0 on validation rows: macro F1. The best was taken, of equals the lowest; "
            "LoRA's on the first data set is afina's default."
        )
        text.append(_chosen(results["chosen"]))
    return "\n\n".join(text)


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = [row["train_rows"] for row in rows]
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"


def _range(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    counts = [row[key] for row in rows]
    return f"{min(counts)} to {max(counts)}" if max(counts) > min(counts) else str(max(counts))


def _chosen(rows: Sequence[Mapping[str, Any]]) -> str:
    rates = sorted({row["rate"] for row in rows})
    lines: dict[tuple[Any, ...], dict[float, str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("data", "way", "a_class", "steps"))
        lines.setdefault(key, {})[row["rate"]] = f"{row['macro_f1']:.3f}"
    cells = [
        [f"{DATA_SETS[data].title}, {size} a class, {WAYS[way].title}, {steps} steps", *(row.get(r, "") for r in rates)]
        for (data, way, size, steps), row in lines.items()
    ]
    return table(["", *(f"{rate:g}" for rate in rates)], cells)


def main() -> None:
    """Measure, or render what was measured."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--sms", type=Path, help="sms_spam.csv")
    parser.add_argument("--clinc", type=Path, help="folder with train.csv, val.csv and test.csv")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["lora", "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="rows a class")
    parser.add_argument("--choose", action="store_true", help="compare learning rates on the validation rows")
    parser.add_argument("--again", action="store_true", help="measure what the file of results has, too")
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "few_rows", render(read_json(options.output)))
        return
    if options.sms is None and options.clinc is None:
        parser.error("--sms FILE or --clinc FOLDER, or both: see above")
    quiet()
    sides = {}
    if options.sms is not None:
        sides["sms_spam"] = sides_of_sms(options.sms)
    if options.clinc is not None:
        sides["clinc150_imbalanced"] = sides_of_clinc(options.clinc)
    results: dict[str, Any] = {}
    if options.output.is_file() and not options.again:
        results = read_json(options.output)
    results["about"] = about(PACKAGES, 1)
    measure(sides, options.ways, options.seeds, options.output, results, choose=options.choose, sizes=options.sizes)


if __name__ == "__main__":
    main()
