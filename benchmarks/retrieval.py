"""Search and reranking: MiniLM with LoRA by afina, beside itself untrained and beside counting shared words (BM25).

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py --questions xquad_es.jsonl
    python benchmarks/retrieval.py --markdown docs/embeddings.md      render what was measured last

The file holds XQuAD's questions, JSON Lines with the columns question and context. Questions about one context stay on one
side, so that no context of the test was trained on. The first writes benchmarks/results/retrieval.json. What is reranked is
a question's context and those of its side that share the most words with it.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from classifier import Clock, quiet
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "retrieval.json"
PACKAGES = ("afina", "torch", "transformers")
SHOWN = {"ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "recall_at_1": "recall@1", "recall_at_10": "recall@10"}
WRONG = 3  # candidates of a query beside its right passage
SIDES = (("train", 0.7), ("validation", 0.1), ("test", 0.2))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def candidates(questions: Path, folder: Path) -> Path:
    """Each question with its context and the contexts of its side that share the most words with it."""
    from afina.tasks.word_search import WordSearch

    rows = read(questions)
    contexts = sorted({row["context"] for row in rows})
    random.Random(0).shuffle(contexts)
    sides, start = dict[str, str](), 0.0
    for side, share in SIDES:
        sides |= dict.fromkeys(contexts[round(start * len(contexts)) : round((start + share) * len(contexts))], side)
        start += share
    with (folder / "candidates.jsonl").open("w", encoding="utf-8") as file:
        for side, _ in SIDES:
            there = [context for context in contexts if sides[context] == side]
            search = WordSearch(there)
            for row in (row for row in rows if sides[row["context"]] == side):
                order = search.scores(row["question"]).argsort()[::-1]
                wrong = [there[i] for i in order if there[i] != row["context"]][:WRONG]
                made = {"question": row["question"], "context": row["context"], "wrong": wrong, "side": side}
                file.write(json.dumps(made, ensure_ascii=False) + "\n")
    return folder / "candidates.jsonl"


def measured(name: str, task: str, file: Path, data: dict[str, str], training: dict[str, Any]) -> dict[str, Any]:
    from afina.training.recipe import DataOptions, Recipe, TrainingOptions
    from afina.training.run import prepare

    recipe = Recipe(
        task={"name": task}, data=DataOptions(file=str(file), **data), training=TrainingOptions(**training),
        method={"name": "lora", "r": 8, "lora_alpha": 8},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()), Clock() as clock:  # fmt: skip
        run = prepare(recipe, Path(folder) / "run")
        metrics = run.execute()
    keys = [*SHOWN, *(f"{key}_interval" for key in SHOWN), "queries", "candidates"]
    ways = {"trained": metrics["test"], **metrics["baselines"]}
    found = {way: {key: made[key] for key in keys if key in made} for way, made in ways.items()}
    rows = {side: len(some.examples) for side, some in run.rows.items()}
    return {"name": name, "task": task, "rows": rows, "figures": found, "cpu_s": round(clock.cpu, 1), **training,
            "precision": run.precision, "train": metrics["train"]["seconds"]}  # fmt: skip


def render(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    where = results["about"]
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    titles = {"trained": "MiniLM, LoRA r=8, trained", "untuned": "MiniLM as it is", "word_search": "shared words (BM25)"}
    machine = f"{where['cpu']}, {where['threads']} thread(s), Python {where['python']}"
    parts = [f"Measured on {where['date']}: {machine}; {versions}."]
    for made in results["sets"]:
        found = made["figures"]
        among = f"{found['trained']['candidates']:,} passages"
        of = f"{WRONG + 1} candidates each" if made["task"] == "reranking" else among
        lines = []
        for way, title in titles.items():
            if way in found:
                lines.append([title, *(_between(found[way], key) for key in SHOWN)])
        parts.append(
            f"**{made['name']}**: {found['trained']['queries']:,} test queries, {of}; trained on {made['rows']['train']:,} "
            f"rows, epochs: {made['epochs']}, rows of a step: {made['batch_size']}, in {made['train']:.0f} s "
            f"({made['precision']})."
        )
        parts.append(table(["95 % intervals in brackets", *SHOWN.values()], lines))
    return "\n\n".join(parts)


def _between(figures: dict[str, Any], key: str) -> str:
    low, high = figures[f"{key}_interval"]
    return f"{figures[key]:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Measure, or render what was measured."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--questions", type=Path)
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "retrieval", render(read_json(options.output)))
        return
    if options.questions is None or not options.questions.is_file():
        parser.error("--questions: the file of XQuAD's questions")
    quiet()
    results: dict[str, Any] = {"about": about(PACKAGES, 1), "sets": []}
    common = {"max_length": 128, "max_truncated": 1.0, "learning_rate": 1e-3}
    with tempfile.TemporaryDirectory() as folder:
        found = candidates(options.questions, Path(folder))
        asked = {"text": "question", "text_pair": "context", "split_column": "side"}
        for name, task, data, training in (
            ("Spanish questions to their contexts", "sentence_similarity", asked,
             {**common, "epochs": 2, "batch_size": 128, "gradient_accumulation": 8}),
            ("Contexts that share words with a question, put in order", "reranking", {**asked, "negatives": "wrong"},
             {**common, "epochs": 1, "batch_size": 8}),
        ):  # fmt: skip
            results["sets"].append(measured(name, task, found, data, training))
            write_json(options.output, results)
            print(json.dumps(results["sets"][-1]), flush=True)


if __name__ == "__main__":
    main()
