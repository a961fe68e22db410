"""Every method that afina shares with Hugging Face PEFT, beside PEFT's, on the same layers with the same values.

    python benchmarks/methods.py                                    measure, write benchmarks/results/methods.json
    python benchmarks/methods.py --markdown docs/benchmarks.md      render what was measured last into the document

Set OMP_NUM_THREADS=1 for numbers that other processes disturb least. `--only dora ia3` measures some methods, `--quick`
runs everything small, to see that it works. Before a pair is timed its outputs, and without dropout its gradients, are
compared: both sides hold the same parameters and must compute the same. As in training, every step casts its parameters
anew under autocast, and a layer's input is what another operation made.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import Contestant, about, alternate, geometric_mean, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "methods.json"
PACKAGES = ("afina", "peft", "torch", "transformers")
NOISE = 1.03  # a ratio up to this is no difference that can be measured here
CLEAR = 0.93  # a ratio above it is not decided by a few samples
KINDS = {"eval": "forward, eval", "train": "forward, train", "step": "forward and backward"}
LINEAR = ("Linear 64, 32 rows", "Linear 251 to 509, 67 rows", "Linear 256, 512 rows", "Linear 1024, 128 rows")
PLAIN = (*LINEAR, "Conv1D 256 to 768, 128 rows")
CONV = ("Conv2d 16 to 32, 3 x 3, 4 pictures of 24 x 24",)
TABLE = ("Embedding 5,003 x 128, 4 x 64 tokens",)
MODELS = ("Llama of 4 layers, width 256, 4 x 32 tokens", "BERT of 4 layers, width 256, 4 x 32 tokens")


@dataclass(frozen=True)
class Case:
    """One method with some options. `config` and `options` say it in both libraries, unless `theirs` says PEFT's."""

    method: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    on: tuple[str, ...] = ()  # layers
    llama: dict[str, Any] | None = None  # options on the models; None: not there
    bert: dict[str, Any] | None = None
    theirs: tuple[str, dict[str, Any]] | None = None
    random: bool = False  # dropout: outputs in training cannot be compared


QV = {"target_modules": ["q_proj", "v_proj"]}
QV_BERT = {"target_modules": ["query", "value"]}
TOKENS = {"token_indices": [3, 17, 41, 97, 211]}
CASES = (
    Case("lora", "LoraConfig", {"r": 8}, (*PLAIN, *CONV, *TABLE), QV, QV_BERT),
    Case("lora", "LoraConfig", {"r": 8, "lora_dropout": 0.1}, (*PLAIN, *CONV), QV, QV_BERT, random=True),
    Case("lora, with biases", "LoraConfig", {"r": 8, "bias": "lora_only"}, PLAIN, None, QV_BERT),
    Case("dora", "LoraConfig", {"r": 8, "use_dora": True}, (*PLAIN, *CONV, *TABLE), QV, QV_BERT),
    Case("dora", "LoraConfig", {"r": 8, "use_dora": True, "lora_dropout": 0.1}, (*PLAIN, *CONV), QV, QV_BERT, random=True),
    Case(
        "ia3", "IA3Config", {"feedforward_modules": []}, (*PLAIN, *CONV),
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    Case("ia3", "IA3Config", {"feedforward_modules": ["layer"]}, (*PLAIN, *CONV)),
    Case("hra", "HRAConfig", {"r": 8}, LINEAR, QV, QV_BERT),
    Case("bitfit (BEFT in PEFT)", "BitFitConfig", {}, LINEAR, None, QV_BERT, theirs=("BeftConfig", {})),
    Case(
        "ln_tuning", "LNTuningConfig", {}, ("LayerNorm 256, 512 rows", "RMSNorm 256, 512 rows"), {},
        {"target_modules": ["LayerNorm"]},
    ),
    Case("trainable_tokens", "TrainableTokensConfig", TOKENS, TABLE, {}, {"target_modules": ["word_embeddings"]}),
    Case(
        "modules_to_save", "LoraConfig", {"r": 8}, (), {**QV, "modules_to_save": ["lm_head"]},
        {**QV_BERT, "modules_to_save": ["pooler"]},
    ),
    Case("prompt_tuning", "PromptTuningConfig", {"num_virtual_tokens": 10}, (), {}, {}),
    Case("prefix_tuning", "PrefixTuningConfig", {"num_virtual_tokens": 10}, (), {}, {}),
    Case("p_tuning", "PromptEncoderConfig", {"num_virtual_tokens": 10, "encoder_hidden_size": 64}, (), {}, {}),
)  # fmt: skip


class Bench:
    """The libraries, the layers and models, and how much to measure."""

    def __init__(self, quick: bool):
        import peft
        import torch

        import afina
        from afina.memory.heap import large_tensors_kept

        # else the system takes pages back from the one or the other by where tensors happen to lie
        large_tensors_kept().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()  # what was imported need not be searched before every sample
        self.torch, self.afina, self.peft, self.quick = torch, afina, peft, quick

    def rounds(self, full: int) -> int:
        """How many samples to take."""
        return 2 if self.quick else full

    def base(self, name: str) -> tuple[Any, dict[str, Any]]:
        """A frozen module of random weights that has the layer at `layer`, or a whole model, and its input."""
        torch, nn = self.torch, self.torch.nn
        torch.manual_seed(0)
        if name in MODELS:
            return self.model(name)
        made: Any
        if name.startswith("Linear"):
            n_in, n_out, rows = {LINEAR[0]: (64, 64, 32), LINEAR[1]: (251, 509, 67), LINEAR[2]: (256, 256, 512)}.get(
                name, (1024, 1024, 128)
            )
            made, x = nn.Linear(n_in, n_out), torch.randn(rows, n_in)
        elif name.startswith("Conv1D"):
            from transformers.pytorch_utils import Conv1D

            made, x = Conv1D(768, 256), torch.randn(128, 256)
        elif name.startswith("Conv2d"):
            made, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(4, 16, 24, 24)
        elif name.startswith("Embedding"):
            made, x = nn.Embedding(5003, 128), torch.randint(0, 256, (4, 64))
        else:
            made, x = (nn.LayerNorm if name.startswith("Layer") else nn.RMSNorm)(256), torch.randn(512, 256)
        holder = nn.ModuleDict({"layer": made})
        holder.forward = lambda x, holder=holder: holder["layer"](x)
        return holder.requires_grad_(False), {"x": x}

    def model(self, name: str) -> tuple[Any, dict[str, Any]]:
        """A small Llama for texts or a small BERT for classes, with ids, mask and labels."""
        from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

        torch, layers = self.torch, 1 if self.quick else 4
        ids = torch.randint(0, 256, (4, 32))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        common = {"hidden_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4}
        if name == MODELS[0]:
            made = LlamaForCausalLM(LlamaConfig(vocab_size=512, intermediate_size=688, use_cache=False, **common))
            return made.requires_grad_(False), inputs | {"labels": ids}
        common |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
        made = BertForSequenceClassification(BertConfig(vocab_size=512, intermediate_size=1024, **common))
        return made.requires_grad_(False), inputs | {"labels": torch.tensor([0, 1, 1, 0])}

    def pair(self, case: Case, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The adapted base in both libraries, with the same values everywhere, and the input."""
        torch = self.torch
        base, inputs = self.base(place)
        options = {"target_modules": ["layer"]}
        if place in MODELS:
            llama = place == MODELS[0]
            options = dict((case.llama if llama else case.bert) or {}) | {"task_type": "CAUSAL_LM" if llama else "SEQ_CLS"}
        models = {}
        for who, library in (("theirs", self.peft), ("ours", self.afina)):
            kind, own = case.theirs if case.theirs and who == "theirs" else (case.config, case.options)
            twin = copy.deepcopy(base, {id(w): w for w in base.parameters()})  # the same weights, at the same place
            if place not in MODELS:
                twin.forward = lambda x, twin=twin: twin["layer"](x)
            models[who] = library.get_peft_model(twin, getattr(library, kind)(**copy.deepcopy({**own, **options})))
        if case.theirs is None:
            with torch.no_grad():
                for parameter in models["theirs"].parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.05)
            if "prefix" in case.method or "prompt" in case.method or "p_tuning" in case.method:
                self._share_prompt(models)
            else:
                state = self.peft.get_peft_model_state_dict(models["theirs"])
                self.afina.set_peft_model_state_dict(models["ours"], state)
        return models, inputs

    def _share_prompt(self, models: dict[str, Any]) -> None:
        """Virtual tokens, and the network behind them, by the order of the parameters."""
        trained = {who: [p for p in m.parameters() if p.requires_grad] for who, m in models.items()}
        with self.torch.no_grad():
            for own in trained["ours"]:
                twin = next(p for p in trained["theirs"] if p.shape == own.shape)
                trained["theirs"].remove(twin)
                own.copy_(twin)

    def calls(self, case: Case, place: str) -> dict[str, Call]:
        """One `Call` a library."""
        models, inputs = self.pair(case, place)
        return {who: Call(self.torch, model, inputs, whole=place in MODELS) for who, model in models.items()}


class Call:
    """An adapted layer or model with its input: what is timed."""

    def __init__(self, torch: Any, model: Any, inputs: dict[str, Any], *, whole: bool):
        self.torch, self.whole = torch, whole
        self.model = model if whole else model.base_model.model
        self.inputs = {k: v.clone() for k, v in inputs.items()}
        if not whole and inputs["x"].is_floating_point():
            self.inputs["x"].requires_grad_()  # as in the middle of a model
        self.leaves = [p for p in model.parameters() if p.requires_grad]
        self.leaves += [v for v in self.inputs.values() if v.requires_grad]
        self.g: Any = None

    def forward(self) -> Any:
        """The layer's output, or the model's loss."""
        self.torch.clear_autocast_cache()  # as at the end of a step; else copies of parameters would be made once for all
        if self.whole:
            return self.model(**self.inputs).loss
        x = self.inputs["x"]
        return self.model(x=x.view_as(x))  # no leaf, of which autocast would keep its copy

    def shown(self) -> Any:
        """What is compared: the layer's output, or the model's logits."""
        with self.torch.no_grad():
            return (self.model(**self.inputs).logits if self.whole else self.model(**self.inputs)).float()

    def evaluate(self, _: Any = None) -> None:
        """Forward without gradients."""
        with self.torch.no_grad():
            self.forward()

    def step(self, _: Any = None) -> None:
        """Forward, and backward to the trained parameters and a layer's input."""
        for leaf in self.leaves:
            leaf.grad = None
        y = self.forward()
        if self.whole:
            y.backward()
            return
        if self.g is None or self.g.dtype != y.dtype:
            self.g = self.torch.randn_like(y)
        y.backward(self.g)

    def kept(self) -> int:
        """Bytes kept for backward, parameters apart, each storage once."""
        found: list[Any] = []
        with self.torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            y = self.forward()
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        del y
        return sum(size for place, size in sizes.items() if place not in own)


def check_equal(case: Case, place: str, calls: dict[str, Call], precise: bool) -> None:
    """Raise SystemExit where the two sides do not compute the same."""
    limit = 2e-4 if precise else 0.08
    pairs = {}
    for call in calls.values():
        call.model.eval()
    pairs["output"] = [calls[who].shown() for who in ("ours", "theirs")]
    if precise and not case.random:
        for call in calls.values():
            call.model.train()
            call.torch.manual_seed(1)
            call.step()
        if len(calls["ours"].leaves) == len(calls["theirs"].leaves) and not case.method.startswith("p_tuning"):
            total = [sum(p.grad.double().square().sum() for p in calls[who].leaves) ** 0.5 for who in ("ours", "theirs")]
            pairs["norm of the gradients"] = total
    for what, (ours, theirs) in pairs.items():
        size = max(float(theirs.abs().max()), 1e-3)
        if not float((ours - theirs).abs().max()) <= limit * size:
            raise SystemExit(f"{case.method} {case.options} on {place}: {what} differs by {(ours - theirs).abs().max():.2g} "
                             f"where values reach {size:.2g}")  # fmt: skip


def places(case: Case) -> Iterator[str]:
    """Where a case is measured."""
    yield from case.on
    yield from (name for name, options in zip(MODELS, (case.llama, case.bert), strict=True) if options is not None)


def measure(bench: Bench, case: Case, place: str, dtype: str) -> dict[str, Any]:
    """Times of one case, and bytes kept for backward; ratios that are not clearly below 1 are measured again, longer."""
    torch = bench.torch
    precision = torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()
    calls = bench.calls(case, place)
    row: dict[str, Any] = {"method": case.method, "options": _said(case), "on": place, "dtype": dtype}
    with precision:
        check_equal(case, place, calls, dtype == "fp32")
        whole = place in MODELS
        for kind in KINDS:
            for call in calls.values():
                call.model.train(kind != "eval")
            run: dict[str, Callable[[Any], Any]] = {
                who: {"eval": call.evaluate, "train": lambda _, call=call: call.forward(), "step": call.step}[kind]
                for who, call in calls.items()
            }
            contestants = {who: Contestant(run[who]) for who in ("ours", "theirs")}
            for rounds in (bench.rounds(5 if whole else 9), bench.rounds(21 if whole else 41)):
                timings = alternate(contestants, rounds, slice_s=0.003, warmup=2)
                ratio = timings["ours"].median() / timings["theirs"].median()
                if ratio < CLEAR or bench.quick:
                    break
            wall = timings["ours"].median("wall") / timings["theirs"].median("wall")
            row[kind] = {
                "us": {who: round(t.median() * 1e6, 1) for who, t in timings.items()},
                "ratio": round(ratio, 3), "wall_ratio": round(wall, 3), "samples": rounds,
            }  # fmt: skip
        kept = {who: call.kept() for who, call in calls.items()}
    row["bytes"] = kept | {"ratio": round(kept["ours"] / kept["theirs"], 3) if kept["theirs"] else float(kept["ours"] > 0)}
    return row


def _said(case: Case) -> str:
    return ", ".join(f"{k}={v}" for k, v in case.options.items() if k not in ("token_indices",))


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A line for each method: geometric mean and worst row of time by kind, and of bytes."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        line: dict[str, Any] = {}
        for kind in (*KINDS, "bytes"):
            ratios = [row[kind]["ratio"] for row in mine]
            line[kind] = {"mean": round(geometric_mean([r for r in ratios if r] or [1.0]), 3), "worst": max(ratios)}
        times = [row[kind]["ratio"] for row in mine for kind in KINDS]
        line["times"], line["slower"] = len(times), sum(ratio > NOISE for ratio in times)
        line["rows"], line["larger"] = len(mine), sum(row["bytes"]["ratio"] > 1 for row in mine)
        found[name] = line
    return found


def render(results: dict[str, Any]) -> str:
    """The table of the document."""
    a = results["about"]
    versions = ", ".join(f"{name} {v}" for name, v in a["versions"].items())
    body = []
    for name, line in summary(results["rows"]).items():
        cells = [f"**{line[kind]['mean']:.2f}** ({line[kind]['worst']:.2f})" for kind in (*KINDS, "bytes")]
        body.append([name, *cells, f"{line['slower']} of {line['times']}", f"{line['larger']} of {line['rows']}"])
    slow = [
        [row["method"], row["options"], row["on"], row["dtype"], KINDS[kind], f"{row[kind]['ratio']:.2f}"]
        for row in results["rows"]
        for kind in KINDS
        if row[kind]["ratio"] > NOISE
    ]
    parts = [
        f"Measured on {a['date']}: {a['cpu']}, {a['cores']} cores, {a['threads']} thread(s), {a['system']}, "
        f"Python {a['python']}; {versions}.",
        "Time and bytes kept for backward, over PEFT's: geometric mean of the rows, and in brackets the worst. Slower: "
        f"times above {NOISE} of PEFT's.",
        table(["", *KINDS.values(), "bytes", "slower", "larger"], body),
    ]
    if slow:
        parts += ["The rows that are slower:", table(["", "options", "on", "dtype", "", "ratio"], slow)]
    return "\n\n".join(parts)


def main() -> None:
    """Measure, or render."""
    names = sorted({case.method for case in CASES})
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--quick", action="store_true", help="everything small and few samples: a test, not a measurement")
    parser.add_argument("--only", nargs="+", choices=names, metavar="METHOD", help=f"of {', '.join(names)}")
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "methods", render(read_json(options.output)))
        return
    if (options.quick or options.only) and options.output == RESULTS:
        parser.error("--quick and --only measure a part: give another --output than the file of results")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bench = Bench(options.quick)
    rows, start = [], time.perf_counter()
    for case in CASES:
        if options.only and case.method not in options.only:
            continue
        for place in places(case):
            for dtype in ("fp32", "bf16"):
                row = measure(bench, case, place, dtype)
                rows.append(row)
                times = "  ".join(f"{kind} {row[kind]['us']['ours']:.0f}/{row[kind]['us']['theirs']:.0f} "
                                  f"{row[kind]['ratio']:.2f}" for kind in KINDS)  # fmt: skip
                print(f"{row['method']} ({row['options']}), {place}, {dtype}: {times}  bytes {row['bytes']['ratio']:.2f}",
                      flush=True)  # fmt: skip
    write_json(options.output, {"about": about(PACKAGES, bench.torch.get_num_threads()), "rows": rows})
    for name, line in summary(rows).items():
        print(f"{name}: {line}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
