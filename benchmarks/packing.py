"""Padding: how much of it like lengths together leave, and whether packing rows without any is faster than that.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --data FOLDER
    python benchmarks/packing.py --markdown docs/benchmarks.md      render what was measured last

The first table counts padding tokens of batches of 16 rows, for messages and for instructions with their answers. The second
trains with LoRA r=8 on all linear layers, forward and backward, in the precision that afina chooses on this machine, with
the same rows in the same order of batches:

    random    padded, rows in random order
    ours      padded, like lengths together: what afina does
    packed    the batches of ours without padding, the rows of a batch one behind the other (training.packing=on)
    tokens    padded, steps of as many tokens as those of ours have on average (training.batch_tokens)

Models have random weights. The most that packing could gain over ours is ours' padding.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import Contestant, about, alternate, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "packing.json"
PACKAGES = ("afina", "torch", "transformers")
BATCH = 16
TEXTS = {"messages": "sms_spam/sms_spam.csv", "instructions": "instructions/self_instruct_flat.jsonl"}
MODELS = {"Llama, width 512, 8 layers": 48, "GPT-2 small": 32}  # and the rows of a sample
WAYS = ("random", "ours", "packed", "tokens")


def base(title: str, data: Path, folder: Path) -> str:
    """A folder with a model of random weights and GPT-2's tokenizer."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    llama = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408}
    if title.startswith("Llama"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=50257, max_position_embeddings=1024, **llama))
    else:
        model = tf.GPT2LMHeadModel(tf.GPT2Config())
    model.save_pretrained(folder)
    tf.AutoTokenizer.from_pretrained(data / "tokenizers/gpt2_hf").save_pretrained(folder)
    return str(folder)


def prepared(model: str, file: Path, folder: Path) -> Any:
    """The run that `afina train` would make of the file."""
    from afina.training.recipe import DataOptions, Recipe
    from afina.training.run import prepare

    messages = file.suffix == ".csv"
    recipe = Recipe(model=model, task={"name": "sequence_classification" if messages else "causal_lm"})
    recipe.data = DataOptions(file=str(file), **({"text": "text", "label": "label"} if messages else {}))
    recipe.training.max_length = 512
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return prepare(recipe, folder / file.stem)


def batches_of(way: str, lengths: Sequence[int]) -> list[list[int]]:
    """The batches of a pass over rows of these lengths."""
    from afina.training.batching import shuffled_batches

    order = list(range(len(lengths)))
    if way == "random":
        random.Random(0).shuffle(order)
        return [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    ours = shuffled_batches(lengths, BATCH, seed=0, epoch=1)
    if way != "tokens":
        return ours
    mean = sum(len(b) * max(lengths[i] for i in b) for b in ours) // len(ours)
    return shuffled_batches(lengths, BATCH, seed=0, epoch=1, tokens=max(mean, *lengths))


def padding(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """The share of padding among the tokens of the batches."""
    return 1 - sum(lengths) / sum(len(b) * max(lengths[i] for i in b) for b in batches)


def steps(run: Any, way: str, rows: Any, batches: Sequence[Sequence[int]]) -> Any:
    """Forward and backward of all batches, as the loop does them."""
    from afina.training.loop import make_engine

    engine = make_engine(run.precision)
    trained = [p for p in run.model.parameters() if p.requires_grad]

    def sample(_: Any) -> None:
        run.model.train()
        run.task.packed = way == "packed"
        for batch in batches:
            made = run.task.collate([rows[i] for i in batch])
            with engine.autocast():
                run.task.loss_sum(run.model, made).backward()
            for p in trained:
                p.grad = None
        run.task.packed = False

    return sample


def measure(data: Path, rounds: int) -> dict[str, Any]:
    """Both tables."""
    import torch

    from afina.fast.attention import short_attention
    from afina.training.loop import make_engine
    from afina.training.packing import settle_packing

    found: dict[str, Any] = {"about": about(PACKAGES, torch.get_num_threads()), "padding": {}, "steps": {}}
    for title, count in MODELS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = base(title, data, folder / "base")
            if not found["padding"]:
                for kind, file in TEXTS.items():
                    lengths = prepared(model, data / file, folder).rows["train"].lengths
                    found["padding"][kind] = {"rows": len(lengths), "length": sum(lengths) / len(lengths)} | {
                        way: padding(batches_of(way, lengths), lengths) for way in WAYS if way != "packed"
                    }
            run = prepared(model, data / TEXTS["instructions"], folder)
            run.recipe.training.packing = "on"
            print(title, *settle_packing(run.model, run.task, run.rows, run.recipe.training, make_engine(run.precision)))
            train = run.rows["train"]
            whole = [b for b in batches_of("ours", train.lengths) if len(b) == BATCH][: count // BATCH]  # of a whole pass
            chosen = [i for batch in whole for i in batch]
            rows, lengths = [train.features[i] for i in chosen], [train.lengths[i] for i in chosen]
            ours = [list(range(i, i + BATCH)) for i in range(0, count, BATCH)]
            batches = {way: ours if way in ("ours", "packed") else batches_of(way, lengths) for way in WAYS}
            contestants = {way: Contestant(steps(run, way, rows, batches[way])) for way in WAYS}
            with short_attention() if run.precision == "bf16" else contextlib.nullcontext():
                timings = alternate(contestants, rounds)
            found["steps"][title] = {
                "rows": count, "tokens": sum(lengths), "precision": run.precision,
                "ways": {
                    way: {"cpu": t.median(), "wall": t.median("wall"),
                          "padding": 0.0 if way == "packed" else padding(batches[way], lengths)}
                    for way, t in timings.items()
                },
            }  # fmt: skip
    return found


def render(found: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    where = found["about"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    machine = f"{where['cpu']}, {where['threads']} thread(s), {where['system']}"
    lines = [f"Measured on {where['date']}: {machine}; {versions}.", ""]
    share = [[f"{kind} ({one['rows']:,} rows, {one['length']:.0f} tokens each)",
              *(f"{one[way]:.1%}" for way in ("random", "ours", "tokens"))]
             for kind, one in found["padding"].items()]  # fmt: skip
    lines += [table(["padding among all tokens", "random order", "like lengths together", "`batch_tokens`"], share), ""]
    rows = []
    for title, one in found["steps"].items():
        ours = one["ways"]["ours"]
        for way, t in one["ways"].items():
            rows.append([f"{title}, {way}", f"{t['padding']:.1%}", f"{one['tokens'] / t['cpu']:,.0f}",
                         f"{ours['cpu'] / t['cpu']:.2f}", f"{ours['wall'] / t['wall']:.2f}"])  # fmt: skip
    head = ["forward and backward, " + next(iter(found["steps"].values()))["precision"], "padding", "tokens a CPU-second",
            "as fast as ours", "by wall time"]  # fmt: skip
    return "\n".join([*lines, table(head, rows)])


def main() -> None:
    """See the module."""
    parser = parser_of(__doc__, renders=False)
    parser.add_argument("--data", type=Path, help="folder with sms_spam, instructions and tokenizers")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if asked.data is not None:
        write_json(RESULTS, measure(asked.data, asked.rounds))
    elif asked.markdown is None:
        parser.error("--data: a folder with sms_spam, instructions and tokenizers")
    text = render(read_json(RESULTS))
    print(text)
    put_into(asked.markdown, "packing", text)


if __name__ == "__main__":
    main()
