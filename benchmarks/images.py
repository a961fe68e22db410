"""Apple, cherry or tomato: MobileNetV2 with adapters, beside a linear probe and PEFT with a plain loop.

    python benchmarks/images.py --data images_fruits360 --model mobilenet_v2_1.0_224
    python benchmarks/images.py --data ... --model ... --left-out --ways probe_long
    python benchmarks/images.py --markdown docs/benchmarks.md      render what was measured last

The first writes benchmarks/results/images.json. The varieties of fruit in test are none of those in train.
manifest.csv says which variety each picture is of: validation rows are of varieties that are not trained on either, so that
what chooses the weights asks what the test asks. A way and seed that the file of results has is not measured again;
`--again` does.

One such split holds five varieties or so, too few to choose a way by. `--left-out` trains on three quarters of the
varieties of train and asks for the rest, four times, so that each is left out once; the test rows are not read. Ways are
to be chosen by that.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from classifier import Clock, quiet
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "images.json"
PACKAGES = ("afina", "peft", "pillow", "torch", "transformers")
FOLDS = 4  # parts of the varieties of train, each left out once
ACCURACY = 0.95  # target of adapters; a linear probe has 0.80 to 0.85
POINTWISE = r".*(first_conv|expand_1x1|reduce_1x1|conv_1x1)\.convolution"  # the convolutions that mix channels

# title, task options, method, training options
Way = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]
PROBE = {"name": "last_layers", "num_layers": 0, "final_norm": False}
WHOLE = {"whole": True, "size": 128}  # nearer to the 100 pixels that the pictures have than the 224 of the model
VARIED = {"augment": "flip", "rotate": 180.0, "colour": 0.3, "hue": 0.08}
UPPER = r".*(layer\.1[345]\.(expand_1x1|reduce_1x1)|conv_1x1)\.convolution"  # of the last blocks
WAYS: dict[str, Way] = {
    "probe": ("linear probe: the head alone, the rest computed once a picture", {}, PROBE,
              {"epochs": 15, "learning_rate": 3e-3}),
    "probe_whole": ("linear probe, pictures read whole at 128 pixels", WHOLE, PROBE, {"epochs": 15, "learning_rate": 3e-3}),
    "probe_long": ("linear probe, read so, 60 epochs, weight decay 1, last weights kept", WHOLE, PROBE,
                   {"epochs": 60, "learning_rate": 3e-3, "weight_decay": 1.0, "evaluate_every": 60}),
    "lora": ("LoRA r=8, all defaults", {}, {"name": "lora"}, {"epochs": 3}),
    "lora_whole": ("LoRA r=8, pictures read whole at 128 pixels", WHOLE, {"name": "lora"}, {"epochs": 3}),
    "lora_upper": ("LoRA r=8 on the last three blocks, read so", WHOLE,
                   {"name": "lora", "target_modules": UPPER}, {"epochs": 20}),
    "lora_varied": ("LoRA r=8, read so, mirrored, turned, in other light and colours", {**WHOLE, **VARIED}, {"name": "lora"},
                    {"epochs": 6}),
    "lora_large": ("LoRA r=8, read whole at 224 pixels, varied", {**WHOLE, "size": 224, **VARIED}, {"name": "lora"},
                   {"epochs": 4}),
}  # fmt: skip


def rows_of(data: Path, folder: Path, fold: int | None = None) -> Any:
    """Where the rows lie, written with their varieties; of a fold, the varieties of train that it leaves out stand for
    those of test."""
    from afina.training.recipe import DataOptions

    with (data / "manifest.csv").open(encoding="utf-8", newline="") as file:
        known = [(row["file"], row["source_path"].split("/")[2]) for row in csv.DictReader(file)]
    rows = {
        side: [(data.resolve() / name, name.split("/")[1], variety) for name, variety in known if name.startswith(side)]
        for side in ("train", "test")
    }
    if fold is not None:
        every = sorted({row[1:] for row in rows["train"]})  # class and variety
        random.Random(0).shuffle(every)
        every.sort(key=lambda pair: pair[0])  # so that each fold has as many of a class
        out = set(every[fold::FOLDS])
        rows = {
            "train": [row for row in rows["train"] if row[1:] not in out],
            "test": [row for row in rows["train"] if row[1:] in out],
        }
    for side, some in rows.items():
        with (folder / f"{side}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image", "label", "variety"), *some])
    return DataOptions(
        file=str(folder / "train.csv"), test_file=str(folder / "test.csv"), group="variety", balance="class_weights"
    )  # fmt: skip


def prepared(way: Way, data: Path, model: Path, seed: int, fold: int | None = None) -> Any:
    """The run, before it trains."""
    from afina.training.recipe import Recipe, TrainingOptions
    from afina.training.run import prepare

    _, task, method, training = way
    place = Path(tempfile.mkdtemp())
    recipe = Recipe(
        task={"name": "image_classification", **task}, model=str(model), data=rows_of(data, place, fold),
        method=dict(method), training=TrainingOptions(seed=seed, **training),
    )  # fmt: skip
    return prepare(recipe, place / "run")


def mistaken(run: Any) -> dict[str, Any]:
    """Pictures of each variety of test that has wrong answers, and how often it was taken for what."""
    with Path(run.recipe.data.test_file).open(encoding="utf-8", newline="") as file:
        varieties = {row["image"]: row["variety"] for row in csv.DictReader(file)}
    found: dict[str, Any] = {}
    with (run.output / "predictions.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            of = found.setdefault(varieties[row["image"]], {"rows": 0, "taken_for": Counter()})
            of["rows"] += 1
            of["taken_for"].update([] if row["answer"] == row["label"] else [row["answer"]])
    return {variety: of for variety, of in sorted(found.items()) if of["taken_for"]}


def ours(run: Any) -> dict[str, Any]:
    """A run from end to end; its time is that of training."""
    with Clock() as clock:
        metrics = run.execute()
    return {
        "accuracy": metrics["test"]["accuracy"], "macro_f1": metrics["test"]["macro_f1"], "rows": metrics["test"]["rows"],
        "validation": metrics["validation"]["macro_f1"],
        "cpu_s": round(clock.cpu, 1), "wall_s": round(clock.wall, 1), "trained": metrics["train"]["trainable_parameters"],
        "precision": metrics["train"]["precision"], "mistaken": mistaken(run),
    }  # fmt: skip


def left_out(way: Way, data: Path, model: Path, seed: int) -> dict[str, Any]:
    """Share of right answers on varieties that were not trained on, each class counting the same, and its rows."""
    confusion: Any = 0
    for fold in range(FOLDS):
        confusion = confusion + np.array(prepared(way, data, model, seed, fold).execute()["test"]["confusion"])
    return {"recall": float((confusion.diagonal() / confusion.sum(1)).mean()), "rows": int(confusion.sum())}


def plain_loop(run: Any) -> dict[str, Any]:
    """PEFT's LoRA of the same rank on the same convolutions, in the loop of PEFT's image classification example: the
    model in training, its BatchNorm layers with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification

    options, task = run.recipe.training, run.task
    torch.manual_seed(options.seed)
    base = AutoModelForImageClassification.from_pretrained(
        run.source.path, id2label=dict(enumerate(task.labels)), ignore_mismatched_sizes=True
    )
    config = LoraConfig(r=8, lora_alpha=8, target_modules=POINTWISE, modules_to_save=["classifier"])
    model: Any = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=float(options.learning_rate or 1e-3))
    features = run.rows["train"].features
    order = torch.Generator().manual_seed(options.seed)
    lean = run.precision == "bf16"
    with Clock() as clock:
        steps = options.epochs * -(-len(features) // options.rows)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(options.epochs):
            model.train()
            for rows in torch.randperm(len(features), generator=order).split(options.rows):
                batch = task.collate([features[i] for i in rows.tolist()])
                with torch.autocast("cpu", torch.bfloat16, enabled=lean):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    model.eval()
    test, answers = run.rows["test"], []
    with torch.no_grad():
        for start in range(0, len(test.features), 32):
            batch = task.collate(test.features[start : start + 32])
            answers += list(model(pixel_values=batch["pixel_values"]).logits.double().softmax(-1).numpy())
    found = task.metrics(answers, test.examples)
    return {
        "accuracy": found["accuracy"], "macro_f1": found["macro_f1"], "rows": found["rows"], "cpu_s": round(clock.cpu, 1),
        "wall_s": round(clock.wall, 1), "trained": sum(p.numel() for p in trained), "precision": run.precision,
    }  # fmt: skip


def render(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    where = results["about"]
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    titles = {**{way: said[0] for way, said in WAYS.items()}, "peft": "PEFT's LoRA r=8, a plain loop, BatchNorm in training"}
    out = {row["way"]: f"{row['recall']:.3f}" for row in results.get("left_out", [])}
    head = ["", "varieties left out", "validation macro F1", "test accuracy", "macro F1", "trained", "epochs", "time"]
    figures = ("validation", "accuracy", "macro_f1")
    lines = [
        [title, out.get(way, ""), *(f"{row[key]:.3f}" if key in row else "" for key in figures),
         f"{row['trained']:,}", row["epochs"], f"{row['cpu_s']:.0f}"]
        for way, title in titles.items() for row in results["rows"] if row["way"] == way
    ]  # fmt: skip
    adapters = [row for row in results["rows"] if row["way"].startswith("lora")]
    best = max(adapters, key=lambda row: row["accuracy"], default={"accuracy": 0.0})
    wrong = [
        f"{variety} ({sum(of['taken_for'].values())} of {of['rows']}, taken for {' and '.join(sorted(of['taken_for']))})"
        for variety, of in best.get("mistaken", {}).items()
    ]
    return "\n\n".join([
        f"Measured on {where['date']}: {where['cpu']}, {where['threads']} thread(s), Python {where['python']}; {versions}.",
        f"{results['rows'][0]['train']:,} pictures to train on, {results['rows'][0]['rows']:,} of other varieties to test. "
        "`time` is process CPU time in seconds, with reading the pictures and the evaluations of each epoch. "
        "`varieties left out` is the share of right answers, each class counting the same, on varieties of train that were "
        f"not trained on, each of them once, in {FOLDS} runs.",
        table(head, lines),
        f"Target: {ACCURACY} with adapters; {best['accuracy']:.3f}, {'met' if best['accuracy'] >= ACCURACY else 'not met'}."
        + (f" What that adapter gets wrong: {', '.join(wrong)}." if wrong else ""),
    ])  # fmt: skip


def main() -> None:
    """Measure, or render what was measured."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--data", type=Path, help="folder images_fruits360")
    parser.add_argument("--model", type=Path, help="folder mobilenet_v2_1.0_224")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "peft"], default=[*WAYS, "peft"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--left-out", action="store_true", help="ask on varieties of train that are left out, not on test")
    parser.add_argument("--again", action="store_true", help="measure what the file of results has, too")
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "images", render(read_json(options.output)))
        return
    for name in ("data", "model"):
        if getattr(options, name) is None or not getattr(options, name).is_dir():
            parser.error(f"--{name}: the folder {'images_fruits360' if name == 'data' else 'mobilenet_v2_1.0_224'}")
    results: dict[str, Any] = {"rows": []}
    if options.output.is_file():
        results = read_json(options.output)
    results["about"] = about(PACKAGES, 1)
    quiet()
    if options.left_out:
        for way in (w for w in options.ways if w != "peft"):
            others = [row for row in results.setdefault("left_out", []) if (row["way"], row["seed"]) != (way, options.seed)]
            if len(others) == len(results["left_out"]) or options.again:
                row = {"way": way, "seed": options.seed,
                       **left_out(WAYS[way], options.data, options.model, options.seed)}  # fmt: skip
                results["left_out"] = [*others, row]
                write_json(options.output, results)
                print(json.dumps(row), flush=True)
        return
    for way in options.ways:
        others = [row for row in results["rows"] if (row["way"], row["seed"]) != (way, options.seed)]
        if len(others) < len(results["rows"]) and not options.again:
            continue
        run = prepared(WAYS["lora" if way == "peft" else way], options.data, options.model, options.seed)
        measure: Callable[[Any], dict[str, Any]] = plain_loop if way == "peft" else ours
        row = {"way": way, "seed": options.seed, "epochs": run.recipe.training.epochs,
               "train": len(run.rows["train"].examples), **measure(run)}  # fmt: skip
        results["rows"] = [*others, row]
        write_json(options.output, results)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
