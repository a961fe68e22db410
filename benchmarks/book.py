"""A classifier of spam as chapter 6 of "Build a Large Language Model (From Scratch)" sets it up, and the same by afina.

GPT-2 small's architecture (124 million parameters, here with random weights: none come with this project), 747 messages of
each class, 70 % of them to train on, 10 % to choose by and 20 % to test on, batches of 8, 5 epochs, AdamW at 5e-5 with a
decay of 0.1 and no dropout; the last block, the final norm and a head of two outputs are trained. The book's settings,
written plainly: every message padded to the longest, 32-bit arithmetic, every step through the whole model, losses of ten
batches every 50 steps, accuracies of ten batches after each epoch and of all rows at the end. afina: a recipe with the same
rows, model, trained layers, batches, epochs, rate and decay, its other defaults as they are.

    python benchmarks/book.py --data sms_spam.csv --tokenizer gpt2/ [--whole] [--markdown docs/benchmarks.md]

Ours runs whole in every round, from the file to the report and with an empty cache. Theirs takes a quarter of an hour and
more: each round times some of its steps and evaluations, and they are multiplied by how many the whole run has. `--whole`
runs it once in full, for its accuracy and to check that estimate.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from harness import about, parser_of, put_into, read_json, table, write_json
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

RESULT = Path(__file__).parent / "results" / "book.json"
TARGET = 25
EACH, EPOCHS, BATCH, RATE, DECAY, READ, EVERY = 747, 5, 8, 5e-5, 0.1, 5, 50
PACKAGES = ("afina", "torch", "transformers")


# --- the rows


def chosen_rows(data: Path, seed: int) -> dict[str, list[tuple[str, int]]]:
    """Text and class of as many messages of each class as there are spam, on three sides."""
    with data.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], int(row["label"] == "spam")) for row in csv.DictReader(file)]
    chance = random.Random(seed)
    spam, ham = ([row for row in rows if row[1] == label] for label in (1, 0))
    mixed = [*spam[:EACH], *chance.sample(ham, EACH)]
    chance.shuffle(mixed)
    first, second = int(len(mixed) * 0.7), int(len(mixed) * 0.8)
    return {"train": mixed[:first], "validation": mixed[first:second], "test": mixed[second:]}


# --- theirs: every line that runs is here


class Attention(nn.Module):
    """Causal self-attention of `heads` heads."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.register_buffer("later", torch.triu(torch.ones(context, context), diagonal=1).bool())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape

        def split(layer: nn.Module) -> torch.Tensor:
            return layer(x).view(rows, tokens, self.heads, -1).transpose(1, 2)

        scores = split(self.query) @ split(self.key).transpose(2, 3)
        scores.masked_fill_(self.later[:tokens, :tokens], -torch.inf)
        weights = torch.softmax(scores / math.sqrt(width // self.heads), dim=-1)
        return self.out((weights @ split(self.value)).transpose(1, 2).reshape(rows, tokens, width))


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, context)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.narrow(F.gelu(self.wide(self.norm_2(x)), approximate="tanh"))


class Plain(nn.Module):
    """GPT-2 with a head of two outputs; logits `[rows, tokens, 2]`."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        width = config.n_embd
        self.tokens, self.places = nn.Embedding(config.vocab_size, width), nn.Embedding(config.n_positions, width)
        self.blocks = nn.Sequential(*(Block(width, config.n_head, config.n_positions) for _ in range(config.n_layer)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def take(self, model: GPT2ForSequenceClassification) -> Plain:
        """The weights of the base that afina is given."""
        source = model.transformer
        self.tokens.weight.copy_(source.wte.weight)
        self.places.weight.copy_(source.wpe.weight)
        for block, h in zip(self.blocks, source.h, strict=True):
            thirds = h.attn.c_attn.weight.T.chunk(3), h.attn.c_attn.bias.chunk(3)
            pairs = [
                *zip((block.attention.query, block.attention.key, block.attention.value), *thirds, strict=True),
                (block.attention.out, h.attn.c_proj.weight.T, h.attn.c_proj.bias),
                (block.wide, h.mlp.c_fc.weight.T, h.mlp.c_fc.bias), (block.narrow, h.mlp.c_proj.weight.T, h.mlp.c_proj.bias),
                (block.norm_1, h.ln_1.weight, h.ln_1.bias), (block.norm_2, h.ln_2.weight, h.ln_2.bias),
            ]  # fmt: skip
            for own, weight, bias in pairs:
                own.weight.copy_(weight)
                own.bias.copy_(bias)
        self.norm.load_state_dict(source.ln_f.state_dict())
        return self


class Theirs:
    """The book's training, with every message padded to the longest."""

    def __init__(self, rows: dict[str, list[tuple[str, int]]], tokenizer: Any, base: Path, seed: int):
        torch.manual_seed(seed)
        coded = {side: [tokenizer.encode(text) for text, _ in some] for side, some in rows.items()}
        length = max(len(ids) for ids in coded["train"])
        self.length = length
        self.loaders = {}
        for side, some in coded.items():
            ids = [[*row[:length], *[tokenizer.eos_token_id] * (length - len(row))] for row in some]
            data = TensorDataset(torch.tensor(ids), torch.tensor([label for _, label in rows[side]]))
            train = side == "train"
            self.loaders[side] = DataLoader(data, batch_size=BATCH, shuffle=train, drop_last=train)
        source = GPT2ForSequenceClassification.from_pretrained(base, num_labels=2)
        self.model = Plain(source.config).take(source)
        for parameter in self.model.parameters():
            parameter.requires_grad = False
        for module in (self.model.blocks[-1], self.model.norm, self.model.head):
            for parameter in module.parameters():
                parameter.requires_grad = True
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=DECAY)
        self.steps = EPOCHS * len(self.loaders["train"])

    def loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(ids)[:, -1], labels)

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(ids, labels).backward()
        self.optimizer.step()

    @torch.no_grad()
    def mean_loss(self, side: str) -> float:
        self.model.eval()
        found = [float(self.loss(*batch)) for batch, _ in zip(self.loaders[side], range(READ), strict=False)]
        self.model.train()
        return sum(found) / len(found)

    @torch.no_grad()
    def accuracy(self, side: str, batches: int | None = None) -> float:
        self.model.eval()
        right = seen = 0
        for number, (ids, labels) in enumerate(self.loaders[side]):
            if number == batches:
                break
            right += int((self.model(ids)[:, -1].argmax(-1) == labels).sum())
            seen += len(labels)
        self.model.train()
        return right / seen

    def whole(self) -> dict[str, float]:
        """The whole run; accuracies of the three sides."""
        self.model.train()
        step = -1
        for _ in range(EPOCHS):
            for batch in self.loaders["train"]:
                self.step(*batch)
                step += 1
                if step % EVERY == 0:
                    print(f"step {step} of {self.steps}, losses {self.mean_loss('train'):.3f}, "
                          f"{self.mean_loss('validation'):.3f}", flush=True)  # fmt: skip
            for side in ("train", "validation"):
                self.accuracy(side, READ)
        return {side: self.accuracy(side) for side in self.loaders}

    @property
    def batches_read(self) -> int:
        """Batches that go through the model without being learned from, in the whole run."""
        return 2 * READ * (math.ceil(self.steps / EVERY) + EPOCHS) + sum(len(loader) for loader in self.loaders.values())

    def sample(self, steps: int) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Some steps and some batches that are read, to be timed."""
        batches = [batch for batch, _ in zip(self.loaders["train"], range(2 * steps), strict=False)]
        self.model.train()
        for batch in batches[:steps]:
            yield "step", lambda batch=batch: self.step(*batch)

        def read(batch: Any) -> None:
            with torch.no_grad():
                self.loss(*batch)

        self.model.eval()
        for batch in batches[steps:]:
            yield "read", lambda batch=batch: read(batch)


# --- ours: a recipe


def ours(data: Path, base: Path, output: Path, cache: Path) -> dict[str, Any]:
    """metrics.json of a whole run, with an empty cache."""
    from afina.data.options import CleanOptions, DataOptions
    from afina.training.recipe import Recipe, TrainingOptions
    from afina.training.run import prepare

    for folder in (output, cache):
        shutil.rmtree(folder, ignore_errors=True)
    os.environ["AFINA_CACHE"] = str(cache)
    clean = CleanOptions(duplicates=False, near_duplicates="ignore", conflicts=False)
    recipe = Recipe(
        model=str(base), method={"name": "last_layers", "num_layers": 1},
        data=DataOptions(file=str(data), text="text", label="label", split_column="side", clean=clean),
        training=TrainingOptions(epochs=EPOCHS, batch_size=BATCH, learning_rate=RATE, weight_decay=DECAY),
    )  # fmt: skip
    return prepare(recipe, output).execute()


# --- the two


def measured(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    rows = chosen_rows(args.data, args.seed)
    data, base = work / "rows.csv", work / "gpt2"
    with data.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "side"])
        writer.writerows([text, ("ham", "spam")[label], side] for side, some in rows.items() for text, label in some)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    nothing_dropped = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2ForSequenceClassification(GPT2Config(num_labels=2, **nothing_dropped)).save_pretrained(base)
    tokenizer.save_pretrained(base)

    began = time.process_time()
    theirs = Theirs(rows, tokenizer, base, args.seed)
    ready = time.process_time() - began
    found: dict[str, list[float]] = {"ours": [], "step": [], "read": [], "theirs": [], "ours_wall": []}
    made: dict[str, Any] = {}
    for number in range(args.rounds + 1):  # the first is not counted
        took: dict[str, list[float]] = {"step": [], "read": []}
        for kind, work_of_it in theirs.sample(args.steps):
            began = time.process_time()
            work_of_it()
            took[kind].append(time.process_time() - began)
        began, wall = time.process_time(), time.perf_counter()
        made = ours(data, base, work / "run", work / "cache")
        if number:
            found["ours"].append(time.process_time() - began)
            found["ours_wall"].append(time.perf_counter() - wall)
            for kind, seconds in took.items():
                found[kind].append(statistics.median(seconds))
            found["theirs"].append(ready + theirs.steps * found["step"][-1] + theirs.batches_read * found["read"][-1])
            print(f"round {number}: theirs {found['theirs'][-1]:.0f} s (of them {found['step'][-1]:.2f} a step), "
                  f"ours {found['ours'][-1]:.1f} s", flush=True)  # fmt: skip
    result = {
        "seconds": found,
        "steps": theirs.steps, "batches_read": theirs.batches_read, "padded_to": theirs.length,
        "ratio": statistics.median([t / o for t, o in zip(found["theirs"], found["ours"], strict=True)]),
        "ours": {"accuracy": made["test"]["accuracy"], "train": made["train"]}, "target": TARGET,
        "rows": {side: len(some) for side, some in rows.items()},
        "limit": limit(rows, tokenizer, theirs),
    }  # fmt: skip
    if args.whole:
        fresh = Theirs(rows, tokenizer, base, args.seed)
        began = time.process_time()
        accuracies = fresh.whole()
        result["whole"] = {"seconds": time.process_time() - began + ready, "accuracy": accuracies}
    return result


def limit(rows: dict[str, list[tuple[str, int]]], tokenizer: Any, theirs: Theirs) -> dict[str, float]:
    """Operations of the matrix products of both, and what this machine does of them in a second and thread."""
    config = GPT2Config()
    block = 12 * config.n_embd**2  # weights that a token is multiplied by
    tokens = {side: sum(len(tokenizer.encode(text)) for text, _ in some) for side, some in rows.items()}
    trunk = 2 * block * (config.n_layer - 1) * sum(tokens.values())
    # of the last block keys and values are computed of every token, forward and twice backward; the rest of one a row
    a_row = 2 * 10 * config.n_embd**2
    train = EPOCHS * 3 * (2 * 2 * config.n_embd**2 * tokens["train"] + a_row * len(rows["train"]))
    every = BATCH * theirs.length
    read = every * 2 * block * config.n_layer
    plain = theirs.steps * (read + every * 2 * block * 2) + theirs.batches_read * read
    return {"ours": trunk + train, "theirs": plain, "fp32": rate(torch.float32), "bf16": rate(torch.bfloat16)}


def rate(dtype: torch.dtype) -> float:
    """Operations a second of a matrix product of a block's shape."""
    a, b = torch.randn(960, 768).to(dtype), torch.randn(3072, 768).to(dtype)
    best = math.inf
    for _ in range(20):
        began = time.process_time()
        F.linear(a, b)
        best = min(best, time.process_time() - began)
    return 2 * 960 * 768 * 3072 / best


def shown(result: dict[str, Any]) -> str:
    machine, found, bound = result["about"], result["seconds"], result["limit"]
    median = {name: statistics.median(values) for name, values in found.items()}
    precision = result["ours"]["train"]["precision"]
    own = bound["bf16" if precision == "bf16" else "fp32"]
    least = {"ours": bound["ours"] / own, "theirs": bound["theirs"] / bound["fp32"]}
    whole = result.get("whole")
    lines = [
        f"Measured on {machine['date']}: {machine['cpu']}, {machine['threads']} thread(s), Python {machine['python']}; "
        + ", ".join(f"{name} {v}" for name, v in machine["versions"].items()) + ".",
        "",
        table(
            ["", "CPU seconds, end to end", "test accuracy", "limit, s", "of the limit"],
            [
                [f"as the book sets it up, fp32 ({result['steps']} steps of {median['step']:.2f} s, "
                 f"{result['batches_read']} batches read in {median['read']:.2f} s)", f"{median['theirs']:.0f}",
                 f"{whole['accuracy']['test']:.1%}" if whole else "", f"{least['theirs']:.0f}",
                 f"{least['theirs'] / median['theirs']:.0%}"],
                [f"afina, {precision}", f"{median['ours']:.1f}", f"{result['ours']['accuracy']:.1%}", f"{least['ours']:.1f}",
                 f"{least['ours'] / median['ours']:.0%}"],
            ],
        ),
        "",
        f"**{result['ratio']:.0f} times faster** (median of {len(found['ours'])} rounds; target {result['target']})."
        + (f" Theirs, run whole once: {whole['seconds']:.0f} s." if whole else "")
        + " The limit is the operations of the matrix products alone over the rate that the machine reaches in one of them ("
        f"{bound['fp32'] / 1e9:.0f} GFLOP/s in fp32, {bound['bf16'] / 1e9:.0f} in bf16). What a run of afina did:",
        "",
        *(f"- {note}" for note in result["ours"]["train"]["notes"]),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, renders=False)
    parser.add_argument("--data", type=Path, help="the SMS Spam Collection as a CSV with the columns text and label")
    parser.add_argument("--tokenizer", type=Path, help="folder of GPT-2's tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of theirs that are timed in a round")
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--whole", action="store_true", help="run theirs once in full")
    args = parser.parse_args()
    if args.data:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        with tempfile.TemporaryDirectory() as work:
            result = {"about": about(PACKAGES, torch.get_num_threads()), **measured(args, Path(work))}
        write_json(RESULT, result)
    result = read_json(RESULT)
    print(shown(result))
    put_into(args.markdown, "book", shown(result))


if __name__ == "__main__":
    main()
