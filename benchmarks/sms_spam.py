"""Spam or not: MiniLM with LoRA by afina's defaults, beside full fine-tuning and PEFT with transformers' Trainer.

    python benchmarks/sms_spam.py --data sms_spam.csv
    python benchmarks/sms_spam.py --markdown docs/benchmarks.md      render what was measured last

The first writes benchmarks/results/sms_spam.json. The file is the SMS Spam Collection (5,574 rows with the columns text and
label). Every way gets the same rows of the same leak-free split, one for each seed. A way and seed that the file of results
has is not measured again; `--again` does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from classifier import Clock, adapted, figures, full, labelled, mean_and_spread, prepared, quiet, stored
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "sms_spam.json"
PACKAGES = ("afina", "peft", "torch", "transformers", "accelerate")
ACCURACY, SPAM_F1 = 0.988, 0.95  # targets, of afina's defaults
FULL_RATE = 5e-5
SPAM = "spam"


def peft_and_trainer(run: Any, *, epochs: int, lean: bool) -> dict[str, Any]:
    """PEFT's LoRA of the same rank on the same layers at the same rate, trained by transformers' Trainer.

    `lean`: in bf16 where afina computes in it, and with rows of like length together, which Trainer does when asked.
    """
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    options = run.recipe.training
    set_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(run.source.path, num_labels=len(run.task.labels))
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(model, config)
    sides = {side: _Rows(*labelled(run, side)) for side in ("train", "test")}
    extra: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if lean else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, seed=options.seed, num_train_epochs=epochs, learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=2 * options.batch_size,
            save_strategy="no", report_to=[], disable_tqdm=True, bf16=lean and run.precision == "bf16", **extra,
        )  # fmt: skip
        collate = DataCollatorWithPadding(run.task.tokenizer)
        trainer = Trainer(model=model, args=arguments, train_dataset=sides["train"], data_collator=collate)
        with Clock() as clock:
            trainer.train()
        model.save_pretrained(folder)
        size = stored(Path(folder))
        model.eval()
        rows = sides["test"]
        scores = []
        with torch.no_grad():
            for start in range(0, len(rows), 2 * options.batch_size):
                batch = collate([rows[i] for i in range(start, min(start + 2 * options.batch_size, len(rows)))])
                batch.pop("labels")
                scores.append(torch.softmax(model(**batch).logits.double(), -1).numpy())
    return figures(classification(run, np.concatenate(scores))) | {
        "steps": trainer.state.global_step, "best_epoch": epochs, "cpu_s": round(clock.cpu, 1),
        "wall_s": round(clock.wall, 1), "precision": "bf16" if arguments.bf16 else "fp32",
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "stored_mib": size,
    }  # fmt: skip


def classification(run: Any, answers: Any) -> Any:
    """The same figures from probabilities of the test rows, in their order."""
    return run.task.metrics(answers, run.rows["test"].examples)


class _Rows:
    """Rows as Trainer reads them."""

    def __init__(self, ids: list[list[int]], targets: list[int]):
        self.ids, self.targets = ids, targets

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "attention_mask": [1] * len(self.ids[i]), "labels": self.targets[i]}


WAYS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "lora": ("afina, LoRA, all defaults", adapted),
    "full": (f"afina's loop, every weight trained, rate {FULL_RATE:g}", lambda run: full(run, FULL_RATE)),
    "peft_1": ("PEFT + Trainer, 1 epoch", lambda run: peft_and_trainer(run, epochs=1, lean=False)),
    "peft_same": (
        "PEFT + Trainer, as many epochs, bf16 and like lengths together",
        lambda run: peft_and_trainer(run, epochs=run.recipe.training.epochs, lean=True),
    ),
}


def measure(data: Path, ways: list[str], seeds: list[int], results: dict[str, Any], save: Callable[[], None],
            **training: Any) -> None:  # fmt: skip
    """Fill in the rows that are not there yet, seeds outermost, so that what is there is always whole seeds."""
    for seed in seeds:
        for way in ways:
            if any(row["way"] == way and row["seed"] == seed for row in results["rows"]):
                continue
            run = prepared(data, seed, **training)
            rows, cleaned = len(run.rows["train"].examples), run.divided.cleaned
            row = {"way": way, "seed": seed, "epochs": run.recipe.training.epochs, "train_rows": rows, **WAYS[way][1](run)}
            results["rows"].append(row)
            results["found"] = {"rows": cleaned.rows, "used": cleaned.kept, "duplicates": len(cleaned.duplicates)}
            save()
            print(json.dumps(row), flush=True)


def render(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    where, found = results["about"], results["found"]
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    lines = []
    by_seed = {(row["way"], row["seed"]): row for row in results["rows"]}
    for way, (title, _) in WAYS.items():
        rows = [row for (w, _), row in by_seed.items() if w == way]
        if not rows:
            continue
        times = [r["cpu_s"] / by_seed["lora", r["seed"]]["cpu_s"] for r in rows if ("lora", r["seed"]) in by_seed]
        lines.append([
            title, len(rows), mean_and_spread([r["accuracy"] for r in rows], ".4f"),
            mean_and_spread([r["f1"][SPAM] for r in rows], ".4f"), f"{rows[0]['trained']:,}", f"{rows[0]['stored_mib']:.1f}",
            mean_and_spread(times, ".2f") if times else "",
        ])  # fmt: skip
    mine = [row for row in results["rows"] if row["way"] == "lora"]
    means = {"accuracy": sum(r["accuracy"] for r in mine) / len(mine), "F1": sum(r["f1"][SPAM] for r in mine) / len(mine)}
    met = means["accuracy"] >= ACCURACY and means["F1"] >= SPAM_F1
    return "\n\n".join([
        f"Measured on {where['date']}: {where['cpu']}, {where['threads']} thread(s), Python {where['python']}; {versions}.",
        f"{found['used']:,} of {found['rows']:,} rows are used; {found['duplicates']:,} are copies of others and were "
        f"dropped before the split into {mine[0]['train_rows']:,} rows to train on, a validation side and "
        f"{mine[0]['rows']:,} to test on. Each seed has a split of its own. Mean of the seeds ± half of their range; `time` "
        "is process CPU time of training, with the evaluations of each epoch where there are some, over the first row's.",
        table(["", "seeds", "accuracy", "spam F1", "trained", "stored, MiB", "time"], lines),
        f"Targets for the first row: accuracy at least {ACCURACY}, spam F1 at least {SPAM_F1}: "
        f"{means['accuracy']:.4f} and {means['F1']:.4f}, {'met' if met else 'not met'}.",
    ])  # fmt: skip


def main() -> None:
    """Measure, or render what was measured."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--data", type=Path, help="sms_spam.csv")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--again", action="store_true", help="measure what the file of results has, too")
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "sms_spam", render(read_json(options.output)))
        return
    if options.data is None or not options.data.is_file():
        parser.error("--data: the file sms_spam.csv of the SMS Spam Collection")
    results: dict[str, Any] = {"rows": []}
    if options.output.is_file() and not options.again:
        results = read_json(options.output)
    results["about"] = about(PACKAGES, 1)
    quiet()
    measure(options.data, options.ways, options.seeds, results, lambda: write_json(options.output, results))


if __name__ == "__main__":
    main()
