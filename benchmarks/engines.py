"""Two processes under every engine beside one process; killed and resumed beside unbroken.

    python benchmarks/engines.py [--engines zero3] [--model minilm] [--data FILE] [--markdown docs/distributed.md]

Every run is `afina train --processes 2`. The killed one loses its first process by SIGKILL after some steps and goes on
with `--resume`. Without `--data` rows are made up. DeepSpeed's engines offload to the host's memory where they can.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from harness import about, parser_of, put_into, read_json, table, write_json
from safetensors.torch import load_file

ENGINES = {"ddp": [], "fsdp2": [], "zero2": ["distributed.offload=true"], "zero3": ["distributed.offload=true"]}
WORDS = ["order", "parcel", "today", "please", "invoice", "account", "when", "number", "again", "still", "thank", "window"]
TELLING = {"complaint": ["broken", "late", "rude"], "other": ["hello", "thanks", "question"]}


def without_dropout(name: str, folder: Path) -> str:
    """A copy of the model whose layers drop nothing: which values are dropped differs with the number of processes."""
    from afina.training.models import find_model

    source = Path(find_model(name).path)
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {key: 0.0 for key, value in config.items() if "drop" in key and isinstance(value, float)}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def rows_made_up(path: Path, count: int) -> Path:
    """Texts in which one word tells the label."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["message", "label"])
        for _ in range(count):
            label = chance.choice(sorted(TELLING))
            words = [*chance.choices(WORDS, k=chance.randrange(5, 24)), chance.choice(TELLING[label])]
            chance.shuffle(words)
            writer.writerow([" ".join(words), label])
    return path


def command(recipe: list[str], output: Path, *words: str) -> list[str]:
    """`afina train` of these words."""
    return [sys.executable, "-m", "afina", "train", *recipe, "--output", str(output), "--quiet", *words]


def finished(words: list[str]) -> tuple[float, int]:
    """Run to the end; seconds, and the most that one of the processes held (resident bytes)."""
    started, most = time.perf_counter(), 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                for child in psutil.Process(process.pid).children() or [psutil.Process(process.pid)]:
                    most = max(most, child.memory_info().rss)
            except psutil.Error:
                pass
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with code {process.returncode}")
    return time.perf_counter() - started, most


def killed(words: list[str], output: Path, step: int) -> None:
    """Run until the log says the step, then kill the first process."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(steps(output)) < step:
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(words)} ended before step {step}")
            time.sleep(0.02)
        first = next(c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "0")
        first.send_signal(signal.SIGKILL)
    if process.returncode != 128 + signal.SIGKILL:
        raise SystemExit(f"after a process was killed the command ended with code {process.returncode}")


def steps(output: Path) -> list[float]:
    """The loss of every step that the log holds."""
    try:
        lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [line["loss"] for line in map(json.loads, (x for x in lines if x.endswith("\n"))) if "loss" in line]


def adapters_apart(a: Path, b: Path) -> float:
    """The largest difference of a weight."""
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    if first.keys() != second.keys():
        raise SystemExit(f"{a} and {b} hold other weights")
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def losses_apart(a: Path, b: Path) -> float:
    """The largest relative difference of a step's loss."""
    first, second = steps(a), steps(b)
    if len(first) != len(second):
        raise SystemExit(f"{a} has {len(first)} steps and {b} {len(second)}")
    return max(abs(x - y) / abs(y) for x, y in zip(first, second, strict=True))


def main() -> None:
    """Measure and write."""
    parser = parser_of(__doc__, renders=False)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "engines.json")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), help="the others are taken from the last results")
    options = parser.parse_args()
    results: dict[str, Any] = read_json(options.json)["engines"] if options.json.is_file() else {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data = options.data or rows_made_up(folder / "rows.csv", options.rows)
        recipe = ["--data", str(data), "--text", "message", "--label", "label", "--model",
                  without_dropout(options.model, folder / "model"), "--epochs", "2", "--precision", "fp32",
                  "training.checkpoint_every=5", "training.gradient_accumulation=2"]  # fmt: skip
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        one = folder / "one"
        seconds, memory = finished(command(recipe, one))
        total = len(steps(one))
        for name in options.engines:
            words = ENGINES[name]
            whole, broken = folder / f"{name}-whole", folder / f"{name}-broken"
            two = ["--processes", "2", "--engine", name, *words]
            took, most = finished(command(recipe, whole, *two))
            killed(command(recipe, broken, *two), broken, total * 2 // 3)
            finished(command([], broken, "--processes", "2", "--resume"))
            train = json.loads((whole / "metrics.json").read_text(encoding="utf-8"))["train"]
            results[name] = {
                "losses": losses_apart(whole, one), "adapter": adapters_apart(whole, one),
                "losses_resumed": losses_apart(broken, whole), "resumed": adapters_apart(broken, whole),
                "weights": train["weights_bytes_of_a_process"] / train["weights_bytes"],
                "seconds": took, "memory": most, "steps": train["steps"], "built": train["engine"],
                "processes": train["processes"], "offload": bool(words),
            }  # fmt: skip
            print(name, results[name], flush=True)
    lines = [
        [f"`{name}`{' with offload' if r['offload'] else ''}", f"{r['losses']:.0e}", f"{r['adapter']:.0e}",
         f"{r['resumed']:.0e}", f"{r['weights']:.0%}", f"{r['memory'] / 2**20:,.0f} MiB"]
        for name, r in results.items()
    ]  # fmt: skip
    titles = ["engine", "losses, from one process (relative)", "adapter, from one process", "adapter, resumed from unbroken",
              "weights in each process", "memory of a process"]  # fmt: skip
    machine = about(["torch", "transformers", "accelerate", "deepspeed"], 1)
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    text = (
        f"{table(titles, lines)}\n\nLargest differences over all {total} steps and all trained weights; the target of a "
        f"resumed adapter is 1e-4. One process holds {memory / 2**20:,.0f} MiB, most of it libraries. "
        f"{options.model} without dropout, "
        f"{'made-up rows' if options.data is None else data.name}; {machine['cpu']}, {versions}."
    )
    write_json(options.json, {"about": machine, "one": {"seconds": seconds, "memory": memory}, "engines": results})
    print(text)
    put_into(options.markdown, "engines", text)


if __name__ == "__main__":
    main()
