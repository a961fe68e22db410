"""LoRA on a 3B model on one GPU: tokens a second and memory, by afina's loop and by a plain loop around PEFT.

Llama-3.2-3B's architecture with random weights in bf16, LoRA r=32 on q_proj and v_proj, batches of 4, AdamW, rows of random
tokens whose lengths are spread as MetaMathQA's are (20,000 rows of 4.2 million tokens). PEFT publishes 7,174 tokens a
second, 13.4 GiB on average and 20.8 GiB at most for this on an L40S.

    python benchmarks/gpu.py [--markdown docs/benchmarks.md]
    python benchmarks/gpu.py --tiny       a model of four small layers, on the CPU as well: whether the script works
    python benchmarks/gpu.py --dropout [--markdown docs/benchmarks.md]
                                          LoRA's dropout alone: a mask that is kept, or drawn again by kernels

Each way trains the same rows in turn, in one process, several times; the first turn is not counted. Memory is what torch has
reserved on the card above what was there before the model, after each step on average and at most.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import about, parser_of, put_into, read_json, table, write_json
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RESULT = Path(__file__).parent / "results" / "gpu.json"
DROPOUT_RESULT = RESULT.with_name("gpu_dropout.json")
DROPOUT = 0.05
LAYERS = ((3072, 3072), (3072, 8192), (8192, 3072))  # in, out, of the model
PACKAGES = ("afina", "peft", "torch", "transformers")
BATCH, RANK, RATE, MEAN = 4, 32, 1e-4, 210
TARGETS = {"tokens": 2.0, "memory": 0.6}
LARGE = {
    "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}  # fmt: skip
TINY = {
    "vocab_size": 1009, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip


@dataclasses.dataclass
class Measured:
    """A turn: tokens that are not padding, seconds, bytes after each step and at most, and the last loss."""

    tokens: int = 0
    seconds: float = 0.0
    held: list[int] = dataclasses.field(default_factory=list)
    peak: int = 0
    loss: float = math.nan


def lengths(count: int) -> list[int]:
    """Tokens of each row: log-normal, from 40 to 768, 210 on average."""
    chance = random.Random(0)
    return [min(768, max(40, round(chance.lognormvariate(math.log(MEAN) - 0.125, 0.5)))) for _ in range(count)]


def rows(count: int, vocabulary: int) -> list[list[int]]:
    """Token ids of each row."""
    chance = random.Random(1)
    return [[chance.randrange(3, vocabulary) for _ in range(length)] for length in lengths(count)]


def base(sizes: dict[str, Any], device: torch.device) -> LlamaForCausalLM:
    """The architecture with random weights in bf16."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    finally:
        torch.set_default_dtype(before)


class Watch:
    """Time and memory from the first step to the last."""

    def __init__(self, device: torch.device):
        self.device, self.found = device, Measured()
        self.card = device.type == "cuda"
        gc.collect()
        if self.card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_reserved() if self.card else 0
        self.began = 0.0

    def begin(self) -> None:
        """A step begins."""
        if not self.began:
            self.wait()
            self.began = time.perf_counter()

    def wait(self) -> None:
        """For the card."""
        if self.card:
            torch.cuda.synchronize()

    def end(self) -> None:
        """A step is over."""
        if self.card:
            self.found.held.append(torch.cuda.memory_reserved() - self.before)

    def done(self, tokens: int, loss: float) -> Measured:
        """All steps are over."""
        self.wait()
        self.found.seconds = time.perf_counter() - self.began
        self.found.tokens, self.found.loss = tokens, loss
        self.found.peak = torch.cuda.max_memory_reserved() - self.before if self.card else 0
        return self.found


def theirs(sizes: dict[str, Any], data: list[list[int]], device: torch.device) -> Measured:
    """A plain loop: every batch padded to its longest row, loss by the model."""
    import peft

    watch = Watch(device)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(sizes, device), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.1)
    chance, order, tokens, loss = random.Random(2), list(range(len(data))), 0, torch.zeros(())
    chance.shuffle(order)
    for first in range(0, len(order), BATCH):
        watch.begin()
        some = [torch.tensor(data[i]) for i in order[first : first + BATCH]]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True).to(device)
        mask = (ids != 0).long()
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int(mask.sum())
        watch.end()
    return watch.done(tokens, float(loss.detach()))


def ours(sizes: dict[str, Any], data: list[list[int]], device: torch.device) -> Measured:
    """The loop of a run, with what a run puts around it."""
    from afina import LoraConfig, get_peft_model
    from afina.data.example import Example
    from afina.memory.step import lean_step
    from afina.tasks.causal_lm import CausalLM
    from afina.tasks.task import Rows
    from afina.training.fast_path import fast_path
    from afina.training.loop import fit, make_engine
    from afina.training.recipe import TrainingOptions

    watch = Watch(device)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    task = CausalLM(tokenizer, CausalLM.Options(), {"form": "text"})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base(sizes, device), config)
    lean_step(model, device)
    task.paths(model)
    features = [{"input_ids": ids, "labels": ids, "row": i} for i, ids in enumerate(data)]
    train = Rows([Example("", "", i) for i in range(len(data))], features)
    few = Rows(train.examples[:1], features[:1])
    options = TrainingOptions(epochs=1, batch_size=BATCH, gradient_accumulation=1, learning_rate=RATE, weight_decay=0.1)
    engine = make_engine("bf16")
    step, last = engine.loss, {}

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        watch.begin()
        return step(*args, **kwargs)

    engine.loss = loss  # type: ignore[method-assign]
    done: list[Measured] = []

    def tell(line: dict[str, Any]) -> None:
        if "gradient_norm" in line:
            watch.end()
            last.update(line)
            if line["step"] == line["of"]:
                done.append(watch.done(line["tokens"], line["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        sides = {"train": train, "validation": few}
        with fast_path(model, task, sides, options, engine):
            fit(model, task, train, few, options, engine, Path(folder), tell=tell)
    engine.close()
    return done[0]


def limit(sizes: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Operations of a token (forward, and backward to the inputs), and the rate of the card in a large product."""
    width, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    head = sizes.get("head_dim", width // sizes["num_attention_heads"])
    attention = width * head * (2 * sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"])
    weights = layers * (attention + 3 * width * inner) + sizes["vocab_size"] * width
    a, b = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = math.inf
    for _ in range(10 if device.type == "cuda" else 2):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - began)
    return {"operations": 4.0 * weights, "rate": 2 * 4096**3 / best}


def dropout(device: torch.device, layers: tuple[tuple[int, int], ...], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of forward and backward of a layer with LoRA, and the bytes kept in between, by each way there is."""
    from afina.core import lowrank
    from afina.core.lora_dropout import LoraDropout

    def made(times: list[float]) -> LoraDropout:
        """A choice that is made beforehand: `times` of the seed and of the mask."""
        return LoraDropout(device.type, lambda _: times.pop(0))

    ways = {"torch's mask": lambda: LoraDropout("none"), "a mask of the kernels": lambda: made([2.0, 1.0]),
            "drawn again": lambda: made([1.0, 2.0])}  # fmt: skip
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    own, found = lowrank.DROPOUT, []
    for width, out in layers:
        weight = torch.randn(out, width, device=device, dtype=torch.bfloat16)
        x = torch.randn(BATCH * MEAN, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        down, up = (torch.randn(*s, device=device, requires_grad=True) for s in ((RANK, width), (out, RANK)))
        layer = lowrank.LowRank(weight, None, down, up, None, 2.0, DROPOUT)
        choices = {name: way() for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        kept = dict.fromkeys(ways, 0)
        for number in range(rounds + 3):
            for name, choice in choices.items():
                lowrank.DROPOUT = choice
                wait()
                before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
                began = time.perf_counter()
                y = lowrank.low_rank_linear(x, layer)
                kept[name] = torch.cuda.memory_allocated() - before - y.nbytes if device.type == "cuda" else 0
                torch.autograd.grad(y, (x, down, up), y.detach())
                wait()
                if number >= 3:
                    times[name].append(time.perf_counter() - began)
        reasons = sorted({way.reason for choice in choices.values() for way in choice.ways.values() if way.reason})
        for name in ways:
            if name == "torch's mask" or not reasons:
                found.append({"layer": f"{width} to {out}", "way": name, "ms": 1e3 * statistics.median(times[name]),
                              "kept": kept[name]})  # fmt: skip
        for reason in reasons:
            print(f"{width} to {out}: {reason}")
    lowrank.DROPOUT = own
    return found


def shown_dropout(result: dict[str, Any]) -> str:
    """What `dropout` found."""
    machine = result["about"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    lines = [[f"{r['layer']}, {r['way']}", f"{r['ms']:.3f}", f"{r['kept'] / 2**20:.1f}"] for r in result["layers"]]
    return "\n".join([
        f"Measured on {machine['date']}: {result['device']}, Python {machine['python']}; {versions}. LoRA r={RANK} in bf16, "
        f"{BATCH * MEAN} rows, dropout {DROPOUT}, forward and backward with the layer's own products.", "",
        table(["", "ms", "MiB kept"], lines),
    ])  # fmt: skip


def shown(result: dict[str, Any]) -> str:
    machine, gib = result["about"], 1 << 30
    lines = []
    for name, title in (("theirs", "PEFT, a plain loop"), ("ours", "afina")):
        turns = result["turns"][name]
        speed = statistics.median(t["tokens"] / t["seconds"] for t in turns)
        held = statistics.median(statistics.mean(t["held"] or [0]) for t in turns) / gib
        peak = statistics.median(t["peak"] for t in turns) / gib
        share = speed * result["limit"]["operations"] / result["limit"]["rate"]
        lines.append([title, f"{speed:,.0f}", f"{held:.1f}", f"{peak:.1f}", f"{share:.0%}", speed, peak])
    speeds, peaks = [line[-2] for line in lines], [line[-1] for line in lines]
    ratio = f"{speeds[1] / speeds[0]:.2f} times the tokens a second (target {TARGETS['tokens']})"
    memory = f", {peaks[1] / peaks[0]:.2f} of the peak (target {TARGETS['memory']})" if peaks[0] else ""
    rate = result["limit"]["rate"] / 1e12
    head = ["", "tokens/s", "GiB on average", "GiB at most", "of the card's rate"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    return "\n".join([
        f"Measured on {machine['date']}: {result['device']}, Python {machine['python']}; {versions}.", "",
        table(head, [line[:-2] for line in lines]), "",
        f"{ratio}{memory}. The rate is that of a product of 4096 by 4096 in bf16, {rate:.1f} TFLOP/s.",
    ])  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__, renders=False)
    parser.add_argument("--tiny", action="store_true", help="a small model, wherever; nothing is written")
    parser.add_argument("--dropout", action="store_true", help="LoRA's dropout alone")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--show", action="store_true", help="render what was measured last")
    args = parser.parse_args()
    if not args.show:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu" and not args.tiny:
            raise SystemExit("no GPU is here; --tiny tries the script on a small model")
        card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        if args.dropout:
            layers = dropout(device, ((101, 67),) if args.tiny else LAYERS, args.rounds)
            result = {"about": about(PACKAGES, torch.get_num_threads()), "device": card, "layers": layers}
            if args.tiny:
                print(shown_dropout(result))
                return
            write_json(DROPOUT_RESULT, result)
    if args.dropout:
        result = read_json(DROPOUT_RESULT)
        print(shown_dropout(result))
        put_into(args.markdown, "gpu_dropout", shown_dropout(result))
        return
    if not args.show:
        sizes = TINY if args.tiny else LARGE
        data = rows(args.rows, sizes["vocab_size"])
        turns: dict[str, list[Any]] = {"theirs": [], "ours": []}
        for number in range(args.rounds + 1):
            for name, way in (("theirs", theirs), ("ours", ours)):
                made = way(sizes, data, device)
                if number:
                    turns[name].append(dataclasses.asdict(made))
        result = {
            "about": about(PACKAGES, torch.get_num_threads()), "device": card, "turns": turns, "limit": limit(sizes, device)
        }  # fmt: skip
        if args.tiny:
            print(shown(result))
            return
        write_json(RESULT, result)
    result = read_json(RESULT)
    print(shown(result))
    put_into(args.markdown, "gpu", shown(result))


if __name__ == "__main__":
    main()
