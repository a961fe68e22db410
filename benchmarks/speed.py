"""Speed of training: LoRA by afina's loop beside PEFT with transformers' Trainer, and beside full fine-tuning.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --data FOLDER
    OMP_NUM_THREADS=1 python benchmarks/speed.py --data FOLDER --only minilm --rounds 3
    python benchmarks/speed.py --markdown docs/benchmarks.md      render what was measured last; README.md: in short
    python benchmarks/speed.py --output benchmarks/results/speed_fp32.json ...      another machine, with a table of its own
    python benchmarks/speed.py --data FOLDER --all        the other measures of speed as well, one after the other

Four jobs, true architectures on real texts: MiniLM (trained weights) and GPT-2 small on SMS spam, BERT-base on 150 intents,
T5-small on summaries of one sentence (random weights). Each is trained in five ways on the same rows, batch 16, in turn,
each way in a process of its own. That of PEFT gets its rows from another, so that it has no more of afina in it than a
user of PEFT has: afina sets how the C library keeps memory (afina/memory/heap.py).

    ours      afina by its defaults: LoRA r=8 on all linear layers, bf16 where the processor has it, like lengths together
    theirs    PEFT + Trainer by their defaults: LoRA r=8 where PEFT puts it by itself, fp32, rows in random order
    expert    PEFT + Trainer set as an expert would: LoRA r=8 on the layers of ours, bf16, group_by_length
    full      every weight trained, by afina's loop, in ours' precision and batches
    limited   ours with a limit of memory, so that little is kept for backward and what is freed goes back to the system

A sample is one pass over the rows of a job, from the begin of its first step to the end of its last; models, checkpoints and
evaluations are outside. Operations are those of the matrix products that were done, counted as they are sent to the
processor; the rate they could be done at is that of the model's own products, forward, at the mean number of tokens of a
batch, measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import Timing, about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "speed.json"
PACKAGES = ("afina", "peft", "torch", "transformers", "accelerate")
BATCH = 16
TARGETS = {"theirs": 5.0, "expert": 1.3, "full": 1.5}  # examples a second of ours over those of each
OTHERS = ("book", "sweep", "methods", "adapters")  # scripts of the other measures


@dataclass(frozen=True)
class Job:
    """A model and its rows."""

    title: str
    task: str
    rows: int  # that a sample trains on
    file: str
    columns: tuple[str, str]


JOBS = {
    "minilm": Job("MiniLM on sms_spam", "sequence_classification", 128, "sms_spam/sms_spam.csv", ("text", "label")),
    "gpt2": Job("GPT-2 small on sms_spam", "sequence_classification", 64, "sms_spam/sms_spam.csv", ("text", "label")),
    "bert": Job(
        "BERT-base on clinc150", "sequence_classification", 96, "clinc150_imbalanced/train.csv", ("text", "label")
    ),
    "t5": Job("T5-small on summarisation", "seq2seq", 16, "summarisation/train_flat.jsonl", ("document", "summary")),
}  # fmt: skip


# --- models


def model_folder(name: str, data: Path, folder: Path) -> str:
    """Where the model of a job is loaded from; random weights are written to `folder` first."""
    import torch
    import transformers as tf

    if name == "minilm":
        return name
    torch.manual_seed(0)
    if name == "gpt2":
        tokenizer, model = tf.AutoTokenizer.from_pretrained(data / "tokenizers/gpt2_hf"), tf.GPT2Model(tf.GPT2Config())
    elif name == "bert":
        tokenizer = tf.AutoTokenizer.from_pretrained(data / "tokenizers/bert_uncased_hf")
        model = tf.BertModel(tf.BertConfig())
    else:
        tokenizer = tf.T5Tokenizer(vocab=pieces(data / "tokenizers/t5/spiece.model"))
        model = tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=512, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128, decoder_start_token_id=0)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pieces(path: Path) -> list[tuple[str, float]]:
    """The pieces of a SentencePiece model and their scores, read without its library."""
    data, found = path.read_bytes(), list[tuple[str, float]]()

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value, at

    at = 0
    while at < len(data):
        field, at = number(at)
        size, at = number(at)
        end, text, score = at + size, "", 0.0
        while field == 10 and at < end:  # a piece: its text is field 1, its score field 2, its kind field 3
            inner, at = number(at)
            if inner == 10:
                length, at = number(at)
                text, at = data[at : at + length].decode(), at + length
            elif inner == 21:
                score, at = struct.unpack("<f", data[at : at + 4])[0], at + 4
            else:
                _, at = number(at)
        if field == 10:
            found.append((text, score))
        at = end
    return found


def prepared(name: str, data: Path, folder: Path, *, limit: str | None = None) -> tuple[Any, Any]:
    """The run of a job as `afina train` makes it, and the rows of a sample."""
    from afina.tasks.task import Rows
    from afina.training.recipe import DataOptions, Recipe
    from afina.training.run import prepare

    job = JOBS[name]
    task = {"name": job.task} | ({"generate": False} if job.task == "seq2seq" else {})
    text, label = job.columns
    recipe = Recipe(model=model_folder(name, data, folder), task=task)
    recipe.memory.limit = limit
    recipe.data = DataOptions(file=str(data / job.file), text=text, label=label)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = prepare(recipe, folder / "run")
    rows = run.rows["train"]
    step = len(rows.features) // job.rows  # rows from everywhere in the file
    chosen = [rows.features[i * step] for i in range(job.rows)]
    features = [{**feature, "row": i} for i, feature in enumerate(chosen)]
    return run, Rows([rows.examples[feature["row"]] for feature in chosen], features)


# --- the five ways: each returns a function that trains a sample and gives its seconds, CPU and wall


class Stretch:
    """From the begin of the first step to the end of the last."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None
        self.last = (0.0, 0.0)

    def begin(self) -> None:
        """A step begins."""
        self.first = self.first or (time.process_time(), time.perf_counter())

    def end(self) -> None:
        """A step is over."""
        self.last = (time.process_time(), time.perf_counter())

    def seconds(self) -> tuple[float, float]:
        """CPU and wall time."""
        assert self.first is not None
        return self.last[0] - self.first[0], self.last[1] - self.first[1]


Sample = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Given:
    """What PEFT + Trainer are given: the rows of a sample in tokens, as ours has them, and where the base lies."""

    base: str  # its folder
    tokenizer: Any
    labels: int  # number of classes; 0: targets are texts
    rows: list[dict[str, list[int]]]
    precision: str  # ours


def given(name: str, data: Path, folder: Path) -> Given:
    """The same rows as ours. Called in a process that ends with it."""
    run, rows = prepared(name, data, folder)
    seq2seq = run.task.name == "seq2seq"
    key = "labels" if seq2seq else "label"
    data_of = [
        {"input_ids": f["input_ids"], "attention_mask": [1] * len(f["input_ids"]), "labels": f[key]} for f in rows.features
    ]
    return Given(run.source.path, run.task.tokenizer, 0 if seq2seq else len(run.task.labels), data_of, run.precision)


@contextlib.contextmanager
def unwritten() -> Iterator[None]:
    """No checkpoints: they lie before the first step and after the last, and whole models take minutes to write."""
    from afina.training import checkpoints

    save, checkpoints.save = checkpoints.save, lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        yield
    finally:
        checkpoints.save = save  # type: ignore[assignment]


def by_our_loop(run: Any, rows: Any, model: Any, rate: float | None = None) -> Sample:
    """Training by afina's loop, with what a run puts around it."""
    import dataclasses

    from afina.memory.heap import large_tensors_kept
    from afina.tasks.task import Rows
    from afina.training.fast_path import fast_path
    from afina.training.loop import fit, make_engine

    options = dataclasses.replace(run.recipe.training, epochs=1, batch_size=BATCH, gradient_accumulation=1)
    options.learning_rate = rate or options.learning_rate
    few = Rows(rows.examples[:2], rows.features[:2])

    def sample() -> tuple[float, float]:
        stretch, engine = Stretch(), make_engine(run.precision)
        step = engine.loss

        def loss(*args: Any, **kwargs: Any) -> Any:
            stretch.begin()
            return step(*args, **kwargs)

        engine.loss = loss  # type: ignore[method-assign]

        def tell(line: dict[str, Any]) -> None:
            if "gradient_norm" in line:
                stretch.end()

        sides = {"train": rows, "validation": few}
        way = fast_path(model, run.task, sides, options, engine)
        kept = large_tensors_kept(run.recipe.memory.roomy(engine.device.type))
        with tempfile.TemporaryDirectory() as folder, unwritten(), kept, way:
            fit(model, run.task, rows, few, options, engine, Path(folder), tell=tell)
        engine.close()
        return stretch.seconds()

    return sample


def ours(name: str, data: Path, folder: Path, *, limit: str | None = None) -> Sample:
    """The run as it was prepared."""
    run, rows = prepared(name, data, folder, limit=limit)
    return by_our_loop(run, rows, run.model)


def full(name: str, data: Path, folder: Path) -> Sample:
    """Every weight of a fresh base."""
    from afina.memory.activations import use_fused_activations

    run, rows = prepared(name, data, folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model = run.task.load_model(run.source.path).requires_grad_(True)
    use_fused_activations(model)
    return by_our_loop(run, rows, model, 1e-5)


def theirs(name: str, data: Path, folder: Path, *, expert: bool = False) -> Sample:
    """PEFT + Trainer; by their defaults, or as an expert sets them."""
    import peft
    import transformers as tf

    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        has = other.submit(given, name, data, folder).result()
    auto = tf.AutoModelForSequenceClassification if has.labels else tf.AutoModelForSeq2SeqLM
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        base = auto.from_pretrained(has.base, **({"num_labels": has.labels} if has.labels else {}))
    base.config.pad_token_id = has.tokenizer.pad_token_id
    targets = {"target_modules": "all-linear"} if expert else {}
    config = peft.LoraConfig(r=8, task_type="SEQ_CLS" if has.labels else "SEQ_2_SEQ_LM", **targets)
    model = peft.get_peft_model(base, config)
    collate: Any = (
        tf.DataCollatorWithPadding(has.tokenizer) if has.labels else tf.DataCollatorForSeq2Seq(has.tokenizer, base)
    )
    set_well: dict[str, Any] = {}
    if expert:
        set_well = {"bf16": has.precision == "bf16", "train_sampling_strategy": "group_by_length"}

    def sample() -> tuple[float, float]:
        stretch = Stretch()

        class Watch(tf.TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                stretch.begin()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                stretch.end()

        with tempfile.TemporaryDirectory() as folder:
            arguments = tf.TrainingArguments(
                output_dir=folder, num_train_epochs=1, per_device_train_batch_size=BATCH, save_strategy="no", report_to=[],
                disable_tqdm=True, use_cpu=True, **set_well,
            )  # fmt: skip
            trainer = tf.Trainer(
                model=model, args=arguments, train_dataset=has.rows, data_collator=collate, callbacks=[Watch()]
            )
            assert trainer.accelerator.mixed_precision == ("bf16" if arguments.bf16 else "no")
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
        return stretch.seconds()

    sample.targets = sorted(getattr(model.peft_config["default"], "target_modules", []))  # type: ignore[attr-defined]
    return sample


# --- measuring


def counted(sample: Sample) -> float:
    """Operations of the matrix products of a sample."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop

    aten = torch.ops.aten
    forward, backward = (
        aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
    )  # fmt: skip

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop(query, key, value))

    def attention_backward(g: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop(g, query, key, value))

    more = {} if forward in flop_registry else {forward: attention, backward: attention_backward}
    with FlopCounterMode(display=False, custom_mapping=more) as mode:
        sample()
    return float(mode.get_total_flops())


def rate(model: Any, tokens: int, dtype: Any) -> float:
    """Operations a second (of CPU time) of the linear layers of a model, forward, for so many rows."""
    import torch
    import torch.nn.functional as F

    shapes = Counter(
        tuple(m.weight.shape if type(m).__name__ == "Linear" else m.weight.shape[::-1])
        for m in model.modules()
        if type(m).__name__ in ("Linear", "Conv1D") and m.weight.numel() > 1 << 16 and m.weight.numel() < 1 << 23
    )
    done = seconds = 0.0
    for (out, n_in), count in shapes.items():
        x, weight = torch.randn(tokens, n_in, dtype=dtype), torch.randn(out, n_in, dtype=dtype)
        F.linear(x, weight)
        calls, start = 0, time.process_time()
        while time.process_time() - start < 0.15:
            F.linear(x, weight)
            calls += 1
        operations = 2.0 * tokens * out * n_in * count
        done, seconds = done + operations, seconds + (time.process_time() - start) / calls * count
    return done / seconds


WAYS: dict[str, Callable[[str, Path, Path], Sample]] = {
    "ours": ours, "theirs": theirs, "expert": partial(theirs, expert=True), "full": full,
    "limited": partial(ours, limit="100GB"),
}  # fmt: skip


def work(name: str, way: str, data: Path) -> None:
    """The process of one way: tells what it is going to do, then trains a sample for each line that it is sent."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, those of other processes too

    def tell(what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    with silence(), tempfile.TemporaryDirectory() as folder:
        sample = WAYS[way](name, data, Path(folder))
        assert (way in ("theirs", "expert")) == ("afina" not in sys.modules)
        tell({"operations": counted(sample), "targets": getattr(sample, "targets", [])})
        for _ in sys.stdin:
            gc.collect()
            gc.disable()
            tell(sample())
            gc.enable()


class Worker:
    """The other end of `work`."""

    def __init__(self, name: str, way: str, options: argparse.Namespace):
        command = [sys.executable, __file__, "--work", name, way, "--data", options.data, "--threads", str(options.threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about: dict[str, Any] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process of a way has ended; its error stands above")
        return json.loads(line)

    def sample(self) -> tuple[float, float]:
        """Seconds, CPU and wall."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        cpu, wall = self._answer()
        return cpu, wall

    def close(self) -> None:
        """The process ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def in_turn(workers: dict[str, Worker], rounds: int) -> dict[str, Timing]:
    """Samples of all ways, taken in turn, in an order that is reversed every round; the first round is not counted."""
    timings = {way: Timing() for way in workers}
    for number in range(rounds + 1):
        order = list(workers.items())
        for way, worker in order if number % 2 else reversed(order):
            cpu, wall = worker.sample()
            if number:
                timings[way].cpu.append(cpu)
                timings[way].wall.append(wall)
    return timings


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No bars, warnings and reports of libraries."""
    import logging
    import warnings

    import transformers

    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one job."""
    import torch

    workers = {way: Worker(name, way, options) for way in WAYS}
    timings = in_turn(workers, options.rounds)
    for worker in workers.values():
        worker.close()
    with tempfile.TemporaryDirectory() as folder:
        run, rows = prepared(name, options.data, Path(folder))
    tokens = sum(len(f["input_ids"]) for f in rows.features)
    most = {"bf16": torch.bfloat16, "fp32": torch.float32}
    rates = {key: rate(run.model, max(1, tokens * BATCH // len(rows.features)), dtype) for key, dtype in most.items()}
    row: dict[str, Any] = {
        "job": name, "title": JOBS[name].title, "rows": len(rows.features), "tokens": tokens, "samples": options.rounds,
        "gflops_a_second": {key: round(value / 1e9, 1) for key, value in rates.items()},
        "targets_of_theirs": workers["theirs"].about["targets"], "ways": {},
    }  # fmt: skip
    for way, timing in timings.items():
        precision = "fp32" if way == "theirs" else run.precision
        cpu, wall = timing.median("cpu"), timing.median("wall")
        operations = workers[way].about["operations"]
        limit = operations / rates[precision]
        row["ways"][way] = {
            "precision": precision, "cpu_s": round(cpu, 4), "wall_s": round(wall, 4),
            "examples_a_second": round(len(rows.features) / wall, 2), "gflops": round(operations / 1e9, 2),
            "limit_s": round(limit, 4), "of_limit": round(limit / cpu, 3),
        }  # fmt: skip
    for way, other in row["ways"].items():
        mine = row["ways"]["ours"]
        other["times_cpu"] = round(other["cpu_s"] / mine["cpu_s"], 2)
        other["times_wall"] = round(other["wall_s"] / mine["wall_s"], 2)
        if way in TARGETS:
            other["met"] = min(other["times_cpu"], other["times_wall"]) >= TARGETS[way]
    return row


# --- the page


TITLES = {
    "ours": "afina, LoRA, defaults",
    "theirs": "PEFT + Trainer, defaults",
    "expert": "PEFT + Trainer, set by an expert",
    "full": "afina's loop, every weight",
    "limited": "afina, LoRA, under a limit of memory",
}


def render(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    where = results["about"]
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    parts = [
        f"Measured on {where['date']}: {where['cpu']}, {where['threads']} thread(s), Python {where['python']}; {versions}. "
        f"Batch {BATCH}; medians."
    ]
    for row in results["rows"].values():
        lines = []
        for way, found in row["ways"].items():
            times = f"{found['times_cpu']:.2f} / {found['times_wall']:.2f}" if way != "ours" else ""
            goal = f"{TARGETS[way]:g}, {'met' if found['met'] else 'not met'}" if way in TARGETS else ""
            lines.append([
                TITLES[way], found["precision"], f"{found['examples_a_second']:.1f}", times, goal,
                f"{found['gflops'] / row['rows']:.2f}", f"{row['rows'] / found['limit_s']:.0f}", f"{found['of_limit']:.0%}",
            ])  # fmt: skip
        rates = " and ".join(f"{value:,.0f} in {key}" for key, value in row["gflops_a_second"].items())
        parts.append(
            f"### {row['title']}\n\n{row['rows']} rows of {row['tokens'] / row['rows']:.0f} tokens; the model's products "
            f"alone reach {rates} GFLOP/s. PEFT by itself adapts {', '.join(row['targets_of_theirs'])}.\n\n"
            + table(
                ["", "", "examples/s", "ours, times (CPU / wall)", "target", "GFLOP a row", "limit, examples/s", "reached"],
                lines,
            )
        )
    return "\n\n".join(parts)


def summary(results: dict[str, Any]) -> str:
    """The few lines of the README: this script's ratios, and those of the other measures of speed that were taken."""
    where, lines = results["about"], []
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("afina", "peft", "transformers", "torch"))
    for row in results["rows"].values():
        for way in TARGETS:
            lines.append([f"{row['title']}: {TITLES['ours']}, over {TITLES[way]}", f"{row['ways'][way]['times_cpu']:.2f}"])
    if (book := RESULTS.parent / "book.json").is_file():
        ratio = read_json(book)["ratio"]
        lines.append(["GPT-2 as a spam classifier, end to end, over the textbook's plain loop", f"{ratio:.0f}"])
    if (sweep := RESULTS.parent / "sweep.json").is_file():
        for case in read_json(sweep)["cases"]:
            share = 8 * case["run_cpu_s"] / case["sweep_cpu_s"]
            lines.append([f"a sweep of 8 runs of {case['method']} on {case['model']}, over 8 runs", f"{share:.2f}"])
    shown = f"How many times faster ({versions}; {where['cpu']}, {where['threads']} thread), by CPU time:"
    return f"{shown}\n\n" + table(["", "times"], lines)


def main() -> None:
    """Measure, or render what was measured."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--data", type=Path, help="the folder of real texts and tokenizers")
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="run the other measures of speed, too")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.markdown:
        shown = summary if options.markdown.name == "README.md" else render
        put_into(options.markdown, options.output.stem, shown(read_json(options.output)))
        return
    if options.data is None or not options.data.is_dir():
        parser.error("--data: the folder of real texts (see the beginning of this file)")
    import torch

    torch.set_num_threads(options.threads)
    if options.work:
        return work(*options.work, options.data)
    results: dict[str, Any] = {"rows": {}}
    if options.output.is_file():
        results = read_json(options.output)
    results["about"] = about(PACKAGES, options.threads)
    with silence():
        for name in options.only:
            row = results["rows"][name] = measure(name, options)
            write_json(options.output, results)
            print(json.dumps(row), flush=True)
    for script in OTHERS if options.all else ():
        path = Path(__file__).parent / f"{script}.py"
        if path.is_file():
            subprocess.run([sys.executable, str(path), "--data", str(options.data)], check=True)


if __name__ == "__main__":
    main()
