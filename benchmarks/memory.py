"""Peak memory of one training step, beside PEFT and transformers' Trainer.

    OMP_NUM_THREADS=1 python benchmarks/memory.py
    python benchmarks/memory.py --only llama --kinds fp32 nf4 --repeats 1 --rewrite no
    python benchmarks/memory.py --markdown docs/benchmarks.md

Models have random weights and true architectures, written to a folder and loaded from there by both. Each setting runs in
a process of its own, ours and theirs in turn: load, LoRA on all linear layers (r=8), one step to warm up, and one that is
measured, from the end of the first to the end of the second: the next batch, forward, backward, clipping, optimizer. Ours
is `afina.training.loop.fit`, as `afina train` calls it; theirs `Trainer.train`. Memory is the kernel's own high-water mark
of what the process holds. The loss of the first step has to be the same on both sides, or nothing is written. Results are
kept setting by setting, and a later call replaces those that it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "memory.json"
TARGET = 0.7
SAME_LOSS = 0.003  # of the loss; 8- and 4-bit arithmetic is not done in the same way by both
RARE = ("mixed", "fp32 checkpointed", "nf4 checkpointed")  # kinds that one model stands for
STANDS_FOR_ALL = "llama"
STEPS = 2  # the first is not measured
# name: what it is, rows of a batch, tokens of a row, target tokens of a row where there is a decoder beside the encoder
MODELS: dict[str, tuple[str, int, int, int]] = {
    "llama": ("Llama, width 512, 8 layers, vocabulary 32,000", 4, 256, 0),
    "gpt2": ("GPT-2 small, vocabulary 50,257", 4, 128, 0),
    "bloom": ("BLOOM, width 512, 6 layers, vocabulary 250,880", 4, 128, 0),
    "mt5": ("mT5 small, vocabulary 250,112", 4, 128, 64),
}
# name: title, dtype of the checkpoint, arithmetic, quantisation
KINDS: dict[str, tuple[str, str, str, str]] = {
    "fp32": ("fp32", "float32", "fp32", ""),
    "mixed": ("fp32 weights, bf16 arithmetic", "float32", "bf16", ""),
    "bf16": ("bf16", "bfloat16", "bf16", ""),
    "int8": ("int8", "bfloat16", "bf16", "int8"),
    "nf4": ("nf4", "bfloat16", "bf16", "nf4"),
    "fp32 checkpointed": ("fp32, blocks computed again", "float32", "fp32", ""),
    "nf4 checkpointed": ("nf4, blocks computed again", "bfloat16", "bf16", "nf4"),
}


def made(name: str) -> Any:
    """A model of random weights."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if name == "llama":
        return tf.LlamaForCausalLM(
            tf.LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
                           num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512)
        )  # fmt: skip
    if name == "gpt2":
        return tf.GPT2LMHeadModel(tf.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    if name == "bloom":
        return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=250880, hidden_size=512, n_layer=6, n_head=8))
    return tf.MT5ForConditionalGeneration(
        tf.MT5Config(vocab_size=250112, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
                     dropout_rate=0.0, decoder_start_token_id=0)
    )  # fmt: skip


def rows(name: str) -> list[dict[str, list[int]]]:
    """Rows of random tokens, as many as a batch, each a target of the model."""
    import torch

    _, count, length, targets = MODELS[name]
    tokens = torch.randint(3, 30000, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    if not targets:
        return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in tokens]  # nothing foretells the first
    return [{"input_ids": ids, "labels": ids[:targets]} for ids in tokens]


class Step:
    """Measures each step but the first, from the end of the one before it."""

    def __init__(self) -> None:
        self.ended, self.losses = 0, list[float]()
        self.peaks, self.seconds, self.cpu = list[Any](), list[float](), list[float]()
        self.open: Any = None

    def end(self, loss: float | None = None) -> None:
        """A step is over."""
        import torch

        from afina.memory.measure import measured

        self.ended += 1
        if loss is not None:
            self.losses.append(loss)
        if self.open is not None:
            self.seconds[-1] += time.perf_counter()
            self.cpu[-1] += time.process_time()
            self.open.__exit__(None, None, None)
        if self.ended < STEPS:
            self.open = measured(torch.device("cpu"))
            self.peaks.append(self.open.__enter__())
            self.seconds.append(-time.perf_counter())
            self.cpu.append(-time.process_time())

    def said(self) -> dict[str, float]:
        """Bytes and seconds: medians."""
        parts = {key: statistics.median(getattr(peak, key) for peak in self.peaks) for key in ("most", "before", "added")}
        seconds = {"seconds": statistics.median(self.seconds), "cpu": statistics.median(self.cpu)}
        return {**parts, **seconds, "loss": self.losses[0]}


def ours(name: str, folder: Path, kind: str) -> Step:
    """Steps of afina's loop."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from afina import LoraConfig, get_peft_model
    from afina.memory.heap import large_tensors_apart, large_tensors_kept
    from afina.memory.step import lean_step
    from afina.memory.storage import Storage
    from afina.tasks.catalogue import find_task
    from afina.tasks.task import Rows
    from afina.training.loop import fit, make_engine
    from afina.training.recipe import TrainingOptions

    _, dtype, precision, quantised = KINDS[kind]
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    _, count, _, targets = MODELS[name]
    cls = find_task("seq2seq" if targets else "causal_lm")
    task: Any = cls(tokenizer, cls.Options(generate=False), {"form": "text"})
    weights = quantised or ("fp32" if dtype == "float32" else "bf16")
    task.storage = Storage.of(weights, AutoConfig.from_pretrained(folder))
    torch.manual_seed(2)
    config: Any = LoraConfig(r=8, target_modules="all-linear", task_type=cls.task_type)
    model = get_peft_model(task.load_model(str(folder)), config)
    again = "checkpointed" in kind
    lean_step(model, torch.device("cpu"), gradient_checkpointing=again, roomy=not again)
    large_tensors_apart()
    features: list[dict[str, Any]] = []
    for i, row in enumerate(rows(name)):
        decoder = {"decoder_ids": [0, *row["labels"][:-1]]} if targets else {"answer_at": 0}
        features.append({**row, "row": i, **decoder})
    side: Any = Rows([], features)
    options = TrainingOptions(epochs=STEPS + 1, batch_size=count, learning_rate=1e-4, precision=precision)
    options.evaluate_every = STEPS + 1
    step = Step()

    def tell(line: Mapping[str, Any]) -> None:
        if "gradient_norm" in line:
            step.end(line["loss"])
        if step.ended == STEPS:
            raise Over

    try:
        with large_tensors_kept(not again), tempfile.TemporaryDirectory() as runs:
            fit(model, task, side, side, options, make_engine(precision), Path(runs), tell=tell)
    except Over:
        pass
    return step


class Over(Exception):  # noqa: N818 (no error)
    """What there was to be measured is measured; the rest of the run is of no interest."""


def theirs(name: str, folder: Path, kind: str) -> Step:
    """Steps of transformers' Trainer over PEFT, set as their guides say."""
    import peft
    import torch
    import transformers as tf

    _, _, precision, quantised = KINDS[kind]
    _, count, _, targets = MODELS[name]
    auto = tf.AutoModelForSeq2SeqLM if targets else tf.AutoModelForCausalLM
    settings: dict[str, Any] = {}
    if quantised == "int8":
        settings["quantization_config"] = tf.BitsAndBytesConfig(load_in_8bit=True)
    elif quantised:
        settings["quantization_config"] = tf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantised, bnb_4bit_compute_dtype=torch.bfloat16
        )
    checkpointed = "checkpointed" in kind
    if quantised:
        settings["device_map"] = {"": "cpu"}
    base = auto.from_pretrained(str(folder), **settings)
    if quantised:
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointed)
    torch.manual_seed(2)
    task_type = "SEQ_2_SEQ_LM" if targets else "CAUSAL_LM"
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type=task_type))
    step = Step()

    class Ends(tf.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            step.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                step.losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as runs:
        arguments = tf.TrainingArguments(
            runs, max_steps=STEPS, per_device_train_batch_size=count, learning_rate=1e-4, bf16=precision == "bf16",
            use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=checkpointed,
        )  # fmt: skip
        data: Any = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows(name)]
        tf.Trainer(model, arguments, train_dataset=data, callbacks=[Ends()]).train()
    return step


def one(side: str, name: str, kind: str, folder: Path) -> dict[str, Any]:
    """One setting, in this process."""
    from classifier import quiet

    quiet()
    calls: dict[str, Callable[[str, Path, str], Step]] = {"ours": ours, "theirs": theirs}
    return calls[side](name, folder, kind).said()


def write_models(names: Sequence[str], root: Path) -> None:
    """The checkpoints that both load."""
    import torch

    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            made(name).to(dtype).save_pretrained(root / f"{name}-{str(dtype).removeprefix('torch.')}")


def measure(
    names: Sequence[str], kinds: Sequence[str], repeats: int, models: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every setting, ours and theirs in turn; `models` is where `--write` has put the checkpoints before."""
    with tempfile.TemporaryDirectory() as made_here:
        root = models or Path(made_here)
        if models is None:
            subprocess.run([sys.executable, __file__, "--write", made_here, "--only", *names], check=True)
        for name in names:
            for kind in kinds:
                if kind in RARE and name != STANDS_FOR_ALL:
                    continue
                runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
                for number in range(repeats):
                    for side in list(runs) if number % 2 else reversed(list(runs)):
                        folder = str(Path(root) / f"{name}-{KINDS[kind][1]}")
                        command = [sys.executable, __file__, "--one", side, name, kind, folder]
                        said = subprocess.run(command, capture_output=True, text=True)
                        if said.returncode:
                            raise SystemExit(f"{side} {name} {kind}:\n{said.stderr[-3000:]}")
                        runs[side].append(json.loads(said.stdout.splitlines()[-1]))
                entry: dict[str, Any] = {
                    side: {key: statistics.median(run[key] for run in of) for key in of[0]} for side, of in runs.items()
                }
                if abs(entry["ours"]["loss"] / entry["theirs"]["loss"] - 1) > SAME_LOSS:
                    raise SystemExit(f"not the same work: {line(name, kind, entry)}")
                print(line(name, kind, entry), flush=True)
                yield f"{name} {kind}", {**entry, "processes": repeats}


def line(name: str, kind: str, entry: Mapping[str, Any]) -> str:
    """A result as text."""
    a, b = entry["ours"], entry["theirs"]
    whole, step = (f"{a[k] / 1e6:,.0f} of {b[k] / 1e6:,.0f} MB ({a[k] / b[k]:.2f})" for k in ("most", "added"))
    times = f"{a['cpu']:.1f} of {b['cpu']:.1f} s of CPU time"
    return f"{name} {kind}: whole {whole}, step {step}, {times}, losses {a['loss']:.4f} and {b['loss']:.4f}"


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rewrite", choices=("yes", "no"), default="yes", help=f"whether {RESULTS.name} is written")
    parser.add_argument("--one", nargs=4, metavar=("SIDE", "MODEL", "KIND", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the checkpoints there, and measure nothing")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="where --write has put them; else they are made anew")
    asked = parser.parse_args()
    if asked.one:
        side, name, kind, folder = asked.one
        print(json.dumps(one(side, name, kind, Path(folder))))
    elif asked.write:
        write_models(asked.only, asked.write)
    elif asked.markdown:
        shown = summary if asked.markdown.name == "README.md" else markdown
        put_into(asked.markdown, "memory", shown(read_json(RESULTS)))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        packages = ("afina", "torch", "transformers", "peft", "bitsandbytes")
        kept = read_json(RESULTS)["results"] if RESULTS.is_file() else {}
        for setting, entry in measure(asked.only, asked.kinds, asked.repeats, asked.models):
            kept[setting] = entry
            if asked.rewrite == "yes":
                write_json(RESULTS, {"about": about(packages, 1), "results": kept})


def summary(results: Mapping[str, Any]) -> str:
    """The ratios of the whole peak alone."""
    of, found, kinds = results["about"], results["results"], ("fp32", "bf16", "int8", "nf4")
    lines = []
    for name in MODELS:
        peaks = [(e["ours"]["most"], e["theirs"]["most"]) for kind in kinds if (e := found.get(f"{name} {kind}"))]
        if len(peaks) == len(kinds):
            lines.append((MODELS[name][0], *(f"{ours / theirs:.2f}" for ours, theirs in peaks)))
    versions = ", ".join(f"{name} {of['versions'][name]}" for name in ("afina", "peft", "transformers", "torch"))
    said = f"Peak memory of a LoRA training step, whole process, over PEFT's with Trainer ({versions}; {of['cpu']}):"
    return f"{said}\n\n{table(('ours / theirs', *kinds), lines)}"


def markdown(results: Mapping[str, Any]) -> str:
    """The table."""
    of = results["about"]
    versions = ", ".join(f"{name} {number}" for name, number in of["versions"].items())
    settings = [f"{name} {kind}" for name in MODELS for kind in KINDS]
    found, parts = {key: results["results"][key] for key in settings if key in results["results"]}, list[str]()
    head = ("", "whole, ours, MB", "theirs", "ratio", "step, ours, MB", "theirs", "ratio", "CPU time, ratio", "met")
    for name in dict.fromkeys(key.split()[0] for key in found):
        lines = []
        for key, entry in found.items():
            if key.split()[0] != name:
                continue
            a, b = entry["ours"], entry["theirs"]
            whole, step = ((f"{a[k] / 1e6:,.0f}", f"{b[k] / 1e6:,.0f}", f"**{a[k] / b[k]:.2f}**") for k in ("most", "added"))
            met = "yes" if a["most"] / b["most"] <= TARGET else "step alone" if a["added"] / b["added"] <= TARGET else "no"
            lines.append((KINDS[key.partition(" ")[2]][0], *whole, *step, f"{a['cpu'] / b['cpu']:.2f}", met))
        title, rows_, length, targets = MODELS[name]
        size = f"{rows_} rows of {length} tokens" + (f" and {targets} target tokens" if targets else "")
        parts.append(f"### {title}; {size}\n\n{table(head, lines)}")
    processes = sorted({entry["processes"] for entry in found.values()})
    repeats = f"Processes a setting, of which the medians: {' or '.join(map(str, processes))}."
    return "\n\n".join(
        [
            f"Measured on {of['date']}: {of['cpu']}, {of['threads']} thread(s), {of['system']}, Python {of['python']}; "
            f"{versions}. {repeats} Target: at most {TARGET} of theirs.",
            *parts,
        ]
    )


if __name__ == "__main__":
    main()
