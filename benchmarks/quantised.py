"""What each storage of a frozen base costs and loses, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/quantised.py --data FOLDER
    python benchmarks/quantised.py --markdown docs/quantised.md      render what was measured last

For MiniLM (22 M parameters) and a Llama of 260,000 parameters that was trained on stories: bytes held, the most that was
held while loading beyond them, outputs beside those in float32. For MiniLM also a LoRA, trained for two epochs on 600
messages of SMS spam in that storage: the figure of the test rows, and what merging into the stored weights would round
away.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "quantised.json"
PACKAGES = ("afina", "torch", "transformers", "bitsandbytes", "torchao")
STORAGES = ("fp32", "bf16", "int8", "int8_weight_only", "nf4", "fp4")


def loaded(auto: Any, path: str, batches: list[Any]) -> dict[str, Any]:
    """Bytes and errors of a model in every storage."""
    import torch

    from afina.core.codecs import stored_bytes
    from afina.core.merge_error import difference, outputs_of
    from afina.memory.measure import measured
    from afina.memory.storage import Storage

    found: dict[str, Any] = {}
    want = None
    for weights in STORAGES:
        Storage(weights).load(auto, path)  # libraries are loaded before it is measured
        with measured(torch.device("cpu")) as peak:
            model, _ = Storage(weights).load(auto, path)
        made = outputs_of(model, batches)
        want = want or made
        apart = difference(made, want)
        held = stored_bytes(model)
        found[weights] = {"bytes": held, "beyond": max(0, peak.added - held), "error": apart.error, "same": apart.agreement}
    return found


def tuned(weights: str, rows: Path, folder: Path) -> dict[str, Any]:
    """A LoRA on MiniLM in one storage: its figures, and what a merge would cost."""
    from afina.core.merge_error import merge_error
    from afina.training.recipe import DataOptions, MemoryOptions, Recipe, TrainingOptions
    from afina.training.run import prepare

    recipe = Recipe(
        model="minilm", data=DataOptions(file=str(rows)), memory=MemoryOptions(weights=weights),
        training=TrainingOptions(epochs=2, precision="fp32"),
    )  # fmt: skip
    run = prepare(recipe, folder)
    done = run.execute()
    side = run.rows["validation"].features
    batches = [run.task.collate(side[i : i + 16]) for i in range(0, min(64, len(side)), 16)]
    report = merge_error(run.model, batches, outputs=run.task.logits)
    return {"test": done["test"]["macro_f1"], "merge": report.to_dict()}


def measure(data: Path) -> dict[str, Any]:
    """Everything, as JSON."""
    import torch
    import transformers as tf

    from afina.training.models import find_model, load_tokenizer

    with (data / "sms_spam" / "sms_spam.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[:601]
    source = find_model("minilm")
    texts = [row[0] for row in rows[1:65]]
    read = load_tokenizer(source)
    batches = [dict(read(texts[i : i + 16], padding=True, truncation=True, return_tensors="pt")) for i in range(0, 64, 16)]
    stories = str(data / "models" / "stories260K-llama")
    reader = tf.AutoTokenizer.from_pretrained(stories)
    prompt = "Once upon a time there was a little dog who liked to play in the park. One day he met a cat."
    written = [dict(reader(prompt, return_tensors="pt", return_token_type_ids=False))]
    result: dict[str, Any] = {
        "minilm": loaded(tf.AutoModel, source.path, batches),
        "stories": loaded(tf.AutoModelForCausalLM, stories, written),
        "tuned": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "rows.csv"
        with few.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
        for weights in STORAGES:
            result["tuned"][weights] = tuned(weights, few, Path(folder) / weights)
    return {**about(PACKAGES, torch.get_num_threads()), **result}


def markdown(result: dict[str, Any]) -> str:
    """Two tables."""
    first = []
    for weights in STORAGES:
        row = [weights]
        for name in ("minilm", "stories"):
            own = result[name][weights]
            share = own["bytes"] / result[name]["fp32"]["bytes"]
            row += [f"{own['bytes'] / 1e6:.1f} MB ({share:.0%})", f"{own['error']:.2%}"]
        first.append([*row, f"{result['minilm'][weights]['beyond'] / 1e6:.0f} MB"])
    second = []
    for weights in STORAGES:
        own = result["tuned"][weights]
        outputs, merge = own["merge"]["outputs"], own["merge"]
        rounded = bool(merge["layers"])
        lost = f"{outputs['lost']:.1%}" if rounded else "-"
        second.append([
            weights, f"{own['test']:.3f}", lost, f"{merge['error']:.2%}" if rounded else "-",
            "refused" if rounded and outputs["lost"] > 0.1 else "done",
        ])  # fmt: skip
    heads = ["weights", "MiniLM", "error", "stories260K", "error", "beyond, while loading MiniLM"]
    tuned_heads = ["weights", "test macro F1", "a merge loses", "error of the outputs", "by default"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    said = f"Measured on {result['date']}: {result['cpu']}, {result['threads']} thread; {versions}."
    return "\n".join([table(heads, first), "", table(tuned_heads, second), "", said]) + "\n"


def main() -> None:
    parser = parser_of(__doc__, renders=False)
    parser.add_argument("--data", type=Path, help="the folder with sms_spam and models")
    given = parser.parse_args()
    if given.data:
        write_json(RESULTS, measure(given.data))
    if given.markdown:
        put_into(given.markdown, "quantised", markdown(read_json(RESULTS)))


if __name__ == "__main__":
    main()
