"""Rankers, DPO, KTO, ORPO and GRPO on a small model: what they learn, and what they hold in memory.

    python benchmarks/preferences.py --pairs pairs.jsonl --model FOLDER
    python benchmarks/preferences.py --markdown docs/preferences.md      render what was measured last

The first writes benchmarks/results/preferences.json. `--pairs` holds prompt, chosen and rejected; `--model` is a small
model that continues stories. KTO gets each pair as one good or one bad answer, by turns. GRPO continues beginnings of
stories, and is rewarded for a word (`--word`). Memory is the bytes of all tensors that are alive after a step, counted by
their storages, beside the bytes of one base: the rest is adapter, gradients and optimizer.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "preferences.json"
PACKAGES = ("afina", "torch", "transformers", "accelerate")
NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue", "Tim", "Lucy", "Jack", "Amy", "Bob", "Ella", "Leo", "Zoe")
BEGINNINGS = (
    "Once upon a time, there was a child named {}.", "One day, {} went to the park.", "{} liked to play outside.",
    "{} and a friend were in the garden.", "In a small house lived {}.", "{} was very happy today.",
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "reward": {"epochs": 3},
    "dpo": {"epochs": 3},
    "kto": {"epochs": 3},
    "orpo": {"epochs": 3},
    "grpo": {"epochs": 5, "batch_size": 8, "learning_rate": 3e-3},
}
OPTIONS: dict[str, dict[str, Any]] = {"grpo": {"group": 8, "max_new_tokens": 48, "template": "none", "beta": 0.02}}


def written(task: str, pairs: Path, folder: Path, word: str) -> tuple[Path, dict[str, Any]]:
    """The file of a task, and options that follow from it."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    options = dict(OPTIONS.get(task, {}))
    if task == "kto":
        sides = ("chosen", "rejected")
        rows = [{"prompt": r["prompt"], "completion": r[sides[i % 2]], "label": i % 2 == 0} for i, r in enumerate(rows)]
    if task == "grpo":
        rows = [{"prompt": beginning.format(name)} for beginning in BEGINNINGS for name in NAMES]
        code = f"def mentions(completions):\n    return [{word!r} in text.lower() for text in completions]\n"
        (folder / "rewards.py").write_text(code, encoding="utf-8")
        options["reward"] = f"{folder / 'rewards.py'}:mentions"
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file, options


def alive() -> dict[int, int]:
    """Bytes of every storage that a tensor is alive in, by its place."""
    import torch

    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type != "meta"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def trained(task: str, pairs: Path, model: str, folder: Path, word: str) -> dict[str, Any]:
    """Figures of one run."""
    from afina.training.recipe import DataOptions, Recipe, TrainingOptions
    from afina.training.run import prepare

    file, options = written(task, pairs, folder, word)
    training = {"epochs": 3, "batch_size": 16, "max_length": 256, "precision": "fp32", **SETTINGS[task]}
    recipe = Recipe(
        task={"name": task, **options}, model=model, data=DataOptions(file=str(file)),
        method={"name": "lora", "r": 16}, training=TrainingOptions(**training),
    )  # fmt: skip
    if task == "grpo":  # beginnings are alike on purpose
        recipe.data.clean.near_duplicates = "ignore"
    before = alive()
    run = prepare(recipe, folder / task)
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    base = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}.values())
    own = sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)
    held, evaluations = list[int](), list[dict[str, Any]]()

    def tell(line: dict[str, Any]) -> None:
        if "validation_loss" in line:
            evaluations.append({k.removeprefix("validation_"): v for k, v in line.items() if k.startswith("validation_")})
        elif "loss" in line and len(held) < 5:
            held.append(sum(size for place, size in alive().items() if place not in before))

    started = time.perf_counter()
    metrics = run.execute(tell)
    test = metrics["test"]
    figures = {key: test[key] for key in (*run.task.figures, *(k for k in test if k.endswith("_interval")))}
    return {
        "rows": test["rows"], "test": figures, "first": evaluations[0], "last": evaluations[-1],
        "before": metrics["baselines"].get("untuned", {}).get("reward"), "baselines": metrics["baselines"],
        "seconds": round(time.perf_counter() - started, 1), "base_bytes": base, "adapter_bytes": own,
        "held_bytes": max(held),
    }  # fmt: skip


def rendered(content: dict[str, Any]) -> str:
    """The tables."""
    runs = content["runs"]
    rows = []
    for name, made in runs.items():
        test, first, last = made["test"], made["first"], made["last"]
        key = next(k for k in ("accuracy", "auc", "reward") if k in test)
        ends = test.get(f"{key}_interval")
        percent = (lambda v: f"{v:.1%}") if key != "reward" else (lambda v: f"{v:.2f}")
        said = percent(test[key]) + (f" ({percent(ends[0])} to {percent(ends[1])})" if ends else "")
        beside = f"{made['before']:.2f}" if key == "reward" else "50 %"
        margins = [f"{made_['margin']:.2f}" for made_ in (first, last) if made_.get("margin") is not None]
        rest = made["held_bytes"] - made["base_bytes"]
        rows.append([f"`{name}`", said, beside, " to ".join(margins),
                     f"{test['kl']:.3f}" if "kl" in test else "", made["rows"], f"{made['seconds']:.0f} s",
                     f"{made['base_bytes'] / 1e6:.2f} MB", f"{rest / made['adapter_bytes']:.1f}"])  # fmt: skip
    head = ["task", "pairs ranked right, good above bad, reward (95 %)", "before", "margin, first to last evaluation",
            "KL per token", "test rows", "took", "one base", "the rest, in adapters"]  # fmt: skip
    where = content["about"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    said = (
        f"{where['cpu']}, {where['threads']} thread; {versions}; {where['date']}. Model {content['model']}, LoRA r=16. "
        f"`grpo` is rewarded where a story mentions “{content['word']}”. *One base* is what the frozen weights take; *the "
        "rest* is everything else alive after a step (adapter, its gradients, two moments of the optimizer, the best "
        "weights so far, rows), in sizes of the adapter: a second copy of the base would show there."
    )
    return f"{table(head, rows)}\n\n{said}"


def main() -> None:
    """See the module."""
    parser = parser_of(__doc__, renders=False)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--word", default="dog")
    parser.add_argument("--tasks", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    asked = parser.parse_args()
    if asked.pairs and asked.model:
        import torch

        torch.set_num_threads(1)
        content: dict[str, Any] = read_json(RESULTS) if RESULTS.is_file() else {"runs": {}}
        content |= {"about": about(PACKAGES, 1), "model": Path(asked.model).name, "word": asked.word}
        with tempfile.TemporaryDirectory() as folder:
            for task in asked.tasks:
                content["runs"][task] = trained(task, asked.pairs, asked.model, Path(folder), asked.word)
                print(task, json.dumps(content["runs"][task]["test"]), flush=True)
                gc.collect()
        write_json(RESULTS, content)
    elif not asked.markdown:
        parser.error("--pairs and --model, or --markdown")
    if asked.markdown:
        content = read_json(RESULTS)
        put_into(asked.markdown, "preferences", rendered(content))


if __name__ == "__main__":
    main()
