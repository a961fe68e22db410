"""A sweep of eight runs beside one run of the same recipe: whole commands, from the start of Python to the report.

    OMP_NUM_THREADS=1 python benchmarks/sweep.py --data sms_spam.csv [--tokenizer gpt2/]
    python benchmarks/sweep.py --markdown docs/benchmarks.md      render what was measured last

`afina train` and `afina sweep` take turns, each in a process of its own with an empty cache, so that the first run of a
sweep computes the frozen trunk as the single run does. What counts is the CPU time of the process. Eight learning rates are
tried; the last block is trained for two epochs and LoRA for one. MiniLM, and with --tokenizer a GPT-2 of six layers of 384
(random weights); rows are the first --rows of the file.
Writes benchmarks/results/sweep.json.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import about, parser_of, put_into, read_json, table, write_json

from afina.report.words import counted

RESULTS = Path(__file__).parent / "results" / "sweep.json"
PACKAGES = ("afina", "torch", "transformers")
COUNT = 8
TARGETS = {"last_layers": 2.0, "lora": 0.8 * COUNT}
EPOCHS = {"last_layers": 2, "lora": 1}
TITLES = {"last_layers": "the last block, its norm and the head", "lora": "LoRA r=8 on all layers"}


def spent(words: list[str], folder: Path) -> tuple[float, float, str]:
    """CPU and wall seconds of a command, and what it printed."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "AFINA_CACHE": str(folder / "cache")}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "afina", *words, "--output", str(folder / "made")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, done.stdout


def measure(model: str, data: Path, method: str, epochs: int, rounds: int) -> dict[str, Any]:
    """Medians of one run and of a sweep, in turns."""
    words = ["--data", str(data), "--text", "text", "--label", "label", "--model", model, "--method", method,
             "--epochs", str(epochs)]  # fmt: skip
    rates = ",".join(f"{rate}e-4" for rate in range(1, COUNT + 1))
    contestants = {"run": ["train", *words], "sweep": ["sweep", *words, f"learning_rate={rates}"]}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    how = ""
    for number in range(rounds):
        order = list(contestants)
        for name in order if number % 2 else reversed(order):
            with tempfile.TemporaryDirectory() as folder:
                cpu, wall, said = spent(contestants[name], Path(folder))
            taken[name].append((cpu, wall))
            if name == "sweep":
                how = next(line.strip() for line in said.splitlines() if "together" in line or "one after another" in line)
        last = {name: f"{times[-1][0]:.1f} s" for name, times in taken.items()}
        print(f"{method}, round {number + 1} of {rounds}: {last}", flush=True)
    made: dict[str, Any] = {"method": method, "epochs": epochs, "rounds": rounds, "how": how}
    for name, times in taken.items():
        made[f"{name}_cpu_s"] = round(statistics.median(cpu for cpu, _ in times), 2)
        made[f"{name}_wall_s"] = round(statistics.median(wall for _, wall in times), 2)
    return made


def first_rows(data: Path, count: int, folder: Path) -> Path:
    """The header and the first rows of a CSV file."""
    import csv

    with data.open(encoding="utf-8", newline="") as file:
        rows = [row for row, _ in zip(csv.reader(file), range(count + 1), strict=False)]
    path = folder / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def gpt2(tokenizer: Path, folder: Path) -> Path:
    """GPT-2's architecture, six layers of 384, with random weights."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2Model

    torch.manual_seed(0)
    made = AutoTokenizer.from_pretrained(tokenizer)
    GPT2Model(GPT2Config(n_layer=6, n_embd=384, n_head=6)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def rendered(result: dict[str, Any]) -> str:
    """The table."""
    machine = result["about"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = []
    for case in result["cases"]:
        ratio, target = case["sweep_cpu_s"] / case["run_cpu_s"], TARGETS[case["method"]]
        further = (case["sweep_cpu_s"] - case["run_cpu_s"]) / (COUNT - 1)
        what = f"{case['model']}, {TITLES[case['method']]}, {counted(case['epochs'], 'epoch')}"
        rows.append([
            what, f"{case['run_cpu_s']:.1f} s", f"{case['sweep_cpu_s']:.1f} s", f"**{ratio:.2f}**",
            f"{case['sweep_wall_s'] / case['run_wall_s']:.2f}", f"{target:.1f}", "met" if ratio <= target else "missed",
            f"{further:.1f} s",
        ])  # fmt: skip
    least = min(case["rounds"] for case in result["cases"])
    head = ["what is trained", "one run", f"sweep of {COUNT}", "ratio, CPU", "ratio, wall", "at most", "", "a further run"]
    return (
        f"Measured on {machine['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread(s), "
        f"{machine['system']}, Python {machine['python']}; {versions}.\n\n"
        f"{result['rows']:,} rows, of which 7 in 10 are learned from; medians of {least}. "
        "A further run is a seventh of what the sweep takes above one run. Start of Python, libraries, base and data "
        "come once in both; the optimizer, the copy of its weights in 16 bits and the reading back of what was written are "
        "each run's own.\n\n" + table(head, rows)
    )


def main() -> None:
    """Measure, or render what was measured."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, help="CSV file with the columns text and label")
    parser.add_argument("--tokenizer", type=Path, help="folder of GPT-2's tokenizer")
    parser.add_argument("--model", default="minilm", help="the first base")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "sweep", rendered(read_json(RESULTS)))
        return
    if options.data is None:
        parser.error("--data is missing: the SMS Spam Collection as a CSV file")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = first_rows(options.data, options.rows, folder)
        models = {Path(options.model).name: options.model}
        if options.tokenizer is not None:
            (folder / "gpt2").mkdir()
            models["GPT-2, 6 layers"] = str(gpt2(options.tokenizer, folder / "gpt2"))
        cases = [{"model": shown, **measure(model, data, method, EPOCHS[method], options.rounds)}
                 for shown, model in models.items() for method in options.methods]  # fmt: skip
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    result = {"about": about(PACKAGES, threads), "rows": options.rows, "cases": cases}
    write_json(RESULTS, result)
    print(rendered(result))


if __name__ == "__main__":
    main()
