"""Apple, cherry or tomato: MobileNetV2 with adapters, beside a linear probe and PEFT with a plain loop.

    python benchmarks/images.py --data images_fruits360 --model mobilenet_v2_1.0_224
    python benchmarks/images.py --markdown docs/benchmarks.md      render what was measured last

The first writes benchmarks/results/images.json. The varieties of fruit in test are none of those in train.
manifest.csv says which variety each picture is of: validation rows are of varieties that are not trained on either, so that
what chooses the weights, and what a way would be chosen by, asks what the test asks. A way and seed that the file of
results has is not measured again; `--again` does.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from classifier import Clock, quiet
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "images.json"
PACKAGES = ("afina", "peft", "pillow", "torch", "transformers")
ACCURACY = 0.95  # target of adapters; a linear probe has 0.80 to 0.85
POINTWISE = r".*(first_conv|expand_1x1|reduce_1x1|conv_1x1)\.convolution"  # the convolutions that mix channels

# title, task options, method, training options
Way = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]
PROBE = {"name": "last_layers", "num_layers": 0, "final_norm": False}
WHOLE = {"whole": True, "size": 128}  # nearer to the 100 pixels that the pictures have than the 224 of the model
VARIED = {"augment": "flip", "rotate": 180.0, "colour": 0.3, "hue": 0.08}
WAYS: dict[str, Way] = {
    "probe": ("linear probe: the head alone, the rest computed once a picture", {}, PROBE,
              {"epochs": 15, "learning_rate": 3e-3}),
    "probe_whole": ("linear probe, pictures read whole at 128 pixels", WHOLE, PROBE, {"epochs": 15, "learning_rate": 3e-3}),
    "lora": ("LoRA r=8, all defaults", {}, {"name": "lora"}, {"epochs": 3}),
    "lora_whole": ("LoRA r=8, pictures read whole at 128 pixels", WHOLE, {"name": "lora"}, {"epochs": 3}),
    "lora_varied": ("LoRA r=8, read so, mirrored, turned, in other light and colours", {**WHOLE, **VARIED}, {"name": "lora"},
                    {"epochs": 6}),
    "lora_large": ("LoRA r=8, read whole at 224 pixels, varied", {**WHOLE, "size": 224, **VARIED}, {"name": "lora"},
                   {"epochs": 4}),
}  # fmt: skip


def rows_of(data: Path, folder: Path) -> Any:
    """Where the rows lie, written with their varieties."""
    from afina.training.recipe import DataOptions

    with (data / "manifest.csv").open(encoding="utf-8", newline="") as file:
        known = [(row["file"], row["source_path"].split("/")[2]) for row in csv.DictReader(file)]
    for side in ("train", "test"):
        with (folder / f"{side}.csv").open("w", encoding="utf-8", newline="") as file:
            rows = [(data.resolve() / name, name.split("/")[1], variety) for name, variety in known if name.startswith(side)]
            csv.writer(file).writerows([("image", "label", "variety"), *rows])
    return DataOptions(
        file=str(folder / "train.csv"), test_file=str(folder / "test.csv"), group="variety", balance="class_weights"
    )  # fmt: skip


def prepared(way: Way, data: Path, model: Path, seed: int) -> Any:
    """The run, before it trains."""
    from afina.training.recipe import Recipe, TrainingOptions
    from afina.training.run import prepare

    _, task, method, training = way
    place = Path(tempfile.mkdtemp())
    recipe = Recipe(
        task={"name": "image_classification", **task}, model=str(model), data=rows_of(data, place),
        method=dict(method), training=TrainingOptions(seed=seed, **training),
    )  # fmt: skip
    return prepare(recipe, place / "run")


def ours(run: Any) -> dict[str, Any]:
    """A run from end to end; its time is that of training."""
    with Clock() as clock:
        metrics = run.execute()
    return {
        "accuracy": metrics["test"]["accuracy"], "macro_f1": metrics["test"]["macro_f1"], "rows": metrics["test"]["rows"],
        "validation": metrics["validation"]["macro_f1"],
        "cpu_s": round(clock.cpu, 1), "wall_s": round(clock.wall, 1), "trained": metrics["train"]["trainable_parameters"],
        "precision": metrics["train"]["precision"],
    }  # fmt: skip


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
    lines = [
        [title, *(f"{row[key]:.3f}" if key in row else "" for key in ("validation", "accuracy", "macro_f1")),
         f"{row['trained']:,}", row["epochs"], f"{row['cpu_s']:.0f}"]
        for way, title in titles.items() for row in results["rows"] if row["way"] == way
    ]  # fmt: skip
    best = max((row["accuracy"] for row in results["rows"] if row["way"].startswith("lora")), default=0.0)
    return "\n\n".join([
        f"Measured on {where['date']}: {where['cpu']}, {where['threads']} thread(s), Python {where['python']}; {versions}.",
        f"{results['rows'][0]['train']:,} pictures to train on, {results['rows'][0]['rows']:,} of other varieties to test. "
        "`time` is process CPU time in seconds, with reading the pictures and the evaluations of each epoch.",
        table(["", "validation macro F1", "test accuracy", "macro F1", "trained", "epochs", "time"], lines),
        f"Target: {ACCURACY} with adapters; {best:.3f}, {'met' if best >= ACCURACY else 'not met'}.",
    ])  # fmt: skip


def main() -> None:
    """Measure, or render what was measured."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--data", type=Path, help="folder images_fruits360")
    parser.add_argument("--model", type=Path, help="folder mobilenet_v2_1.0_224")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "peft"], default=[*WAYS, "peft"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="measure what the file of results has, too")
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "images", render(read_json(options.output)))
        return
    for name in ("data", "model"):
        if getattr(options, name) is None or not getattr(options, name).is_dir():
            parser.error(f"--{name}: the folder {'images_fruits360' if name == 'data' else 'mobilenet_v2_1.0_224'}")
    results: dict[str, Any] = {"rows": []}
    if options.output.is_file() and not options.again:
        results = read_json(options.output)
    results["about"] = about(PACKAGES, 1)
    quiet()
    for way in options.ways:
        if any((row["way"], row["seed"]) == (way, options.seed) for row in results["rows"]):
            continue
        run = prepared(WAYS["lora" if way == "peft" else way], options.data, options.model, options.seed)
        measure: Callable[[Any], dict[str, Any]] = plain_loop if way == "peft" else ours
        row = {"way": way, "seed": options.seed, "epochs": run.recipe.training.epochs,
               "train": len(run.rows["train"].examples), **measure(run)}  # fmt: skip
        results["rows"].append(row)
        write_json(options.output, results)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
