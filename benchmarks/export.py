"""What each format of `afina export` costs and gains: the spam classifier on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/export.py --data sms_spam.csv
    python benchmarks/export.py --markdown docs/export.md      render what was measured last

The first trains MiniLM by examples/sms_spam.yaml (or takes a finished run, --run) and writes benchmarks/results/export.json:
size, speed beside the merged model in float32 (alternating rounds of batches of 16 validation rows), and the figures of all
validation and test rows.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import about, parser_of, put_into, read_json, table, write_json

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "export.json"
PACKAGES = ("afina", "torch", "transformers", "onnx", "onnxruntime")
NAMES = ("merged", "int8", "onnx", "onnx-int8")
FASTER, SMALLER, ACCURACY = 2.0, 1 / 3, 0.005  # targets of int8


def trained_run(data: str, folder: Path) -> Path:
    """MiniLM by the recipe."""
    from afina.training.recipe import read_recipe
    from afina.training.run import prepare

    recipe = read_recipe(ROOT / "examples" / "sms_spam.yaml")
    recipe.data.file = data
    prepare(recipe, folder).execute()
    return folder


def measured(run: Path, name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """One format: bytes, speed, figures."""
    from afina.data.read import read_table
    from afina.export.exporting import export
    from afina.export.format import Settings
    from afina.export.formats import find_format
    from afina.export.golden import read_golden
    from afina.export.measures import alternated, figures_of
    from afina.export.merged import read_merged
    from afina.tasks.catalogue import task_from_settings
    from afina.training.trained import TrainedRun

    done = export(run, name, folder / name, Settings(max_drop=1.0))
    made, golden = find_format(name), read_golden(folder / name)
    task = task_from_settings(golden["task"], made.processor(folder / name))
    trained, model = TrainedRun.load(run), made.load(folder / name, task)
    figures = {}
    for side in ("validation", "test"):
        names = trained.columns
        rows = read_table(run / "data" / f"{side}.csv", set(names.values()))
        examples = trained.examples([{role: row[n] for role, n in names.items()} for row in rows.rows], rows.lines)
        features = task.encode(examples, golden["length"], golden["limit"]).features
        figures[side] = {"rows": len(examples), **figures_of(model, task, examples, features)}
        if side == "validation":
            speed = alternated(read_merged(folder / "merged"), model, task, features, rounds)
    return {
        "bytes": done.bytes, "share": done.bytes / done.merged_bytes, "times": speed.ratio, "times_cpu": speed.cpu,
        "rows_per_second": speed.after, **figures,
        "golden": {"prompts": done.replay.prompts, "largest": done.replay.largest, "mean": done.replay.mean},
    }  # fmt: skip


def rendered(results: dict[str, Any]) -> str:
    """The table, and whether the targets are met."""
    said, formats = results["about"], results["formats"]
    versions = ", ".join(f"{name} {version}" for name, version in said["versions"].items())
    plain = formats["merged"]
    rows = []
    for name, one in formats.items():
        rows.append([
            f"`{name}`", f"{one['bytes'] / 2**20:.1f} MiB", f"{one['share']:.2f}", f"{one['times_cpu']:.2f}",
            f"{one['times']:.2f}", f"{one['validation']['accuracy']:.2%}", f"{one['test']['accuracy']:.2%}",
            f"{one['test']['macro_f1']:.4f}", f"{one['golden']['largest']:.1e}",
        ])  # fmt: skip
    head = ["format", "size", "share", "times as fast", "wall", "accuracy, validation", "accuracy, test", "macro F1, test",
            "golden prompts differ by"]  # fmt: skip
    lines = [
        f"Measured on {said['date']}: {said['cpu']}, {said['cores']} cores, {said['threads']} thread(s), {said['system']}, "
        f"Python {said['python']}; {versions}.",
        "",
        f"MiniLM (22.7 M parameters) tuned by LoRA on the SMS Spam Collection; {plain['validation']['rows']} validation and "
        f"{plain['test']['rows']} test rows. `share` is of the merged model's size; `times as fast` is the ratio of "
        "processor time to the merged model's in float32, `wall` that of wall time, both medians of alternating rounds.",
        "",
        table(head, rows),
        "",
    ]
    for name in ("int8", "onnx-int8"):
        one = formats[name]
        lost = max(plain[side]["accuracy"] - one[side]["accuracy"] for side in ("validation", "test"))
        met = [one["times_cpu"] >= FASTER, one["share"] <= SMALLER, lost <= ACCURACY]
        lines.append(
            f"- `{name}`: {one['times_cpu']:.2f} times as fast (target {FASTER:g}: {_met(met[0])}), {one['share']:.2f} of "
            f"the size (target {SMALLER:.2f}: {_met(met[1])}), accuracy {lost * 100:+.2f} points lost at most (target "
            f"{ACCURACY * 100:g}: {_met(met[2])})."
        )
    return "\n".join(lines)


def _met(yes: bool) -> str:
    return "met" if yes else "**not met**"


def main() -> None:
    """Measure, or render."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", help="the SMS Spam Collection as CSV")
    parser.add_argument("--run", type=Path, help="a finished run, instead of training one")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "export", rendered(read_json(RESULTS)))
        return
    if not options.data and not options.run:
        parser.error("--data or --run is needed")
    import torch

    from afina.cli.show import quiet

    quiet()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or trained_run(options.data, Path(folder) / "run")
        formats = {}
        for name in NAMES:
            formats[name] = measured(run, name, Path(folder), options.rounds)
            print(name, json.dumps(formats[name]), flush=True)
    results = {"about": about(PACKAGES, torch.get_num_threads()), "formats": formats}
    write_json(RESULTS, results)
    print(rendered(results))


if __name__ == "__main__":
    main()
