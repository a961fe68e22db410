"""One dog, learned by a small pipeline of each family: does the loss fall, and does diffusers draw the same?

    OMP_NUM_THREADS=1 python benchmarks/dreambooth.py --data ../shared/data/dreambooth_dog/dog
    python benchmarks/dreambooth.py --markdown docs/benchmarks.md      render what was measured last

The first writes benchmarks/results/dreambooth.json. Pipelines have random weights and the parts of the true ones, each
small; `afina dreambooth` is run for each as a process of its own, pictures of the class made by the base included. Of
each run is measured

- the loss on the five pictures with noise that is always the same, by the base and with the adapter;
- the largest difference of a pixel (of 0 to 1) between a picture drawn by the pipeline with the adapter of afina in it, and
  one drawn by diffusers alone after `load_lora_weights`, beside the difference from the base's picture;
- whether the factors are the same bits in Kohya's form, and in Kohya's form again after diffusers';
- what the command wrote on the standard error stream: nothing, where libraries keep quiet.

Stable Diffusion 1.5 in its true size is planned beside it, from its configurations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "dreambooth.json"
PACKAGES = ("afina", "diffusers", "peft", "torch", "transformers")
TITLES = {"sd": "Stable Diffusion 1.x (UNet)", "sdxl": "SDXL (UNet, two text encoders)",
          "sd3": "Stable Diffusion 3 (transformer, flow matching)", "flux": "Flux (transformer, flow matching)"}  # fmt: skip
SIDE, WIDE = 64, 4  # pixels, and how many times as wide as in the tests
PROMPT, OF_CLASS = "a photo of sks dog", "a photo of dog"
SAME = 1e-4  # of a pixel
PEFT, LIMIT = 8.12e9, 11e9  # bytes: what PEFT publishes with checkpointing, and what it has to stay under


def afina(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of afina, as a process."""
    command = [sys.executable, "-m", "afina", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


def done(*words: str) -> subprocess.CompletedProcess[str]:
    """The same; SystemExit with what it said where it failed."""
    made = afina(*words)
    if made.returncode:
        said = f"{made.stdout[-2000:]}\n{made.stderr[-4000:]}"
        raise SystemExit(f"afina {' '.join(words)} ended with {made.returncode}:\n{said}")
    return made


def drawn(pipeline: Any) -> Any:
    """A picture `[height, width, 3]`, 0 to 1."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(PROMPT, num_inference_steps=4, height=SIDE, width=SIDE, output_type="np",
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    return torch.from_numpy(made.images[0])


def pipeline_of(base: Path, **parts: Any) -> Any:
    """By diffusers."""
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(base, **parts)


def pictures_compared(base: Path, run: Path) -> tuple[float, float]:
    """Largest differences of a pixel: diffusers' with the adapter from ours, and ours from the base's."""
    from afina.training.trained import TrainedRun

    made = TrainedRun.load(run).model.get_base_model()
    ours = drawn(pipeline_of(base, **{name: getattr(made, name) for name in (made.config.family.core, *made.texts)}))
    pipeline = pipeline_of(base)
    before = drawn(pipeline)
    pipeline.load_lora_weights(run / "adapter")
    return float((drawn(pipeline) - ours).abs().max()), float((ours - before).abs().max())


def kohya_compared(base: Path, run: Path, folder: Path) -> bool:
    """Whether Kohya's form holds the bits of the adapter, and again after it was diffusers'."""
    import torch
    from safetensors.torch import load_file

    from afina.diffusion.factors import factors_of_adapter, read_factors
    from afina.diffusion.outline import layers_per_block, shapes_of
    from afina.diffusion.pipelines import pipeline_config

    done("export", str(run), "--format", "kohya", "--output", str(folder / "kohya"))
    first = folder / "kohya" / "kohya.safetensors"
    done("export", str(first), "--format", "diffusers", "--model", str(base), "--output", str(folder / "diffusers"))
    file = next((folder / "diffusers").glob("*.safetensors"))
    done("export", str(file), "--format", "kohya", "--model", str(base), "--output", str(folder / "again"))
    one, other = load_file(first), load_file(folder / "again" / "kohya.safetensors")
    config = pipeline_config(str(base))
    own, read = factors_of_adapter(run / "adapter"), read_factors(first, shapes_of(config), config.family,
                                                                  layers_per_block(config))  # fmt: skip
    return (
        one.keys() == other.keys()
        and all(torch.equal(one[k], other[k]) for k in one)
        and own.keys() == read.keys()
        and (all(torch.equal(read[p].down, f.down) and torch.equal(read[p].up, f.up) for p, f in own.items()))
    )


def learned(family: str, data: Path, steps: int, folder: Path) -> dict[str, Any]:
    """A run of the command, and what is to be known of it."""
    from diffusion_bases import make_pipeline

    base, run = folder / "base", folder / "run"
    make_pipeline(family, SIDE, WIDE).save_pretrained(base)
    started = time.perf_counter()
    said = done(
        "dreambooth", "--data", str(data), "--prompt", PROMPT, "--class-prompt", OF_CLASS, "--class-pictures", "5",
        "--model", str(base), "--output", str(run), "--steps", str(steps), "--batch-size", "5", "--learning-rate", "0.02",
        "--resolution", str(SIDE), "r=8", "lora_alpha=8", "task.show_pictures=2",
        "task.show_steps=4", *(["task.text_tokens=32"] if family in ("sd3", "flux") else ["target_modules=all-linear"]),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    apart, moved = pictures_compared(base, run)
    return {
        "family": family, "before": metrics["baselines"]["untuned"]["loss"], "after": metrics["test"]["loss"],
        "trained": metrics["train"]["trainable_parameters"], "total": metrics["train"]["total_parameters"],
        "in_diffusers": apart, "from_base": moved, "kohya": kohya_compared(base, run, folder),
        "said": said.stderr.splitlines(), "seconds": round(seconds, 1), "steps": metrics["train"]["steps"],
    }  # fmt: skip


def planned(folder: Path) -> dict[str, int]:
    """Bytes by part of Stable Diffusion 1.5 in its true size, at the moment that takes most."""
    from diffusion_bases import save_true_sd15

    from afina.training.plan import planner_for
    from afina.training.recipe import MemoryOptions, Recipe, TrainingOptions

    recipe = Recipe(
        task={"name": "dreambooth", "instance_prompt": PROMPT}, model=str(save_true_sd15(folder)),
        training=TrainingOptions(batch_size=1, evaluation_batch_size=1),
        memory=MemoryOptions(gradient_checkpointing=True, weights="fp32"),
    )  # fmt: skip
    made = planner_for(recipe, "cuda").plan(recipe)
    return {**made.moments["train"].device, "in all": made.total}


def render(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    where = results["about"]
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    rows = [
        [TITLES[row["family"]], f"{row['trained']:,} of {row['total']:,}", f"{row['before']:.3f}", f"{row['after']:.3f}",
         f"{row['in_diffusers']:.1e}", f"{row['from_base']:.2f}", "the same bits" if row["kohya"] else "**other bits**",
         f"{row['seconds']:.0f} s"]
        for row in results["rows"]
    ]  # fmt: skip
    good = all(row["after"] < row["before"] and row["in_diffusers"] <= SAME and row["kohya"] for row in results["rows"])
    quiet = sum(len(row["said"]) for row in results["rows"])
    plan = results["plan"]
    parts = [[name, f"{size / 2**30:.2f}"] for name, size in plan.items() if size >= 2**20 or name == "in all"]
    steps = results["rows"][0]["steps"]
    return "\n\n".join([
        f"Measured on {where['date']}: {where['cpu']}, {where['threads']} thread(s), Python {where['python']}; {versions}.",
        table(["", "trained", "loss, base", "loss, adapter", "diffusers beside ours", "adapter beside base",
               "Kohya's form", "took"], rows),
        f"{steps} steps of five pictures of {SIDE} pixels and five of the class, LoRA r=8 on every linear layer of a UNet, "
        "on the attention of a transformer (Kohya's form names no others). Targets: "
        f"the loss falls, diffusers draws the same to {SAME:g}, Kohya's file comes back with the same bits: "
        f"{'met' if good else 'not met'}. Lines on the standard error stream, of all commands: {quiet}.",
        "Stable Diffusion 1.5 in its true size, planned (weights in float32, one picture of 512 pixels a step, blocks "
        "computed again), GiB:",
        table(["", "GiB"], parts),
        f"Target: less than {LIMIT / 2**30:.2f} GiB (11 GB): {'met' if plan['in all'] < LIMIT else 'not met'} in plan. PEFT "
        f"publishes {PEFT / 2**30:.2f} GiB (8.12 GB) for its script with checkpointing.",
    ])  # fmt: skip


def main() -> None:
    """Measure, or render what was measured."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--data", type=Path, help="folder of five pictures of one subject")
    parser.add_argument("--families", nargs="+", choices=TITLES, default=[*TITLES])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    if options.markdown is not None:
        put_into(options.markdown, "dreambooth", render(read_json(options.output)))
        return
    if options.data is None or not options.data.is_dir():
        parser.error("--data: the folder of the pictures")
    import torch

    from afina.cli.show import quiet

    quiet()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"about": about(PACKAGES, 1), "rows": []}
    with tempfile.TemporaryDirectory() as place:
        results["plan"] = planned(Path(place) / "sd15")
        for family in options.families:
            (folder := Path(place) / family).mkdir()
            results["rows"].append(learned(family, options.data, options.steps, folder))
            print(json.dumps(results["rows"][-1]), flush=True)
    write_json(options.output, results)


if __name__ == "__main__":
    main()
