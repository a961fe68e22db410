"""Many adapters of one model: switching between them, swapping them from files, and mixing them in one batch, beside PEFT.

    python benchmarks/adapters.py                                    measure, write benchmarks/results/adapters.json
    python benchmarks/adapters.py --markdown docs/benchmarks.md      render what was measured last into the document

Set OMP_NUM_THREADS=1 for numbers that other processes disturb least. `--only mixed` measures one section, `--quick` runs
everything small, to see that it works. Models have the architecture of MiniLM (6 layers, width 384) or GPT-2's layers (6 of
12) with random weights, LoRA r=8 on all linear layers; both sides hold the same values, and their answers are compared
before they are timed. PEFT mixes adapters in a batch by `adapter_names`, which it does not train.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import Contestant, about, alternate, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "adapters.json"
PACKAGES = ("afina", "peft", "torch", "transformers")
HALF = 0.5  # of the rate of one adapter is the least that a mixture is to reach
SWITCHED = 12  # adapters that are switched between


class Bench:
    """Both libraries, and models of both with the same adapters."""

    def __init__(self, quick: bool):
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        import peft
        import torch
        import transformers

        import afina

        self.quick, self.torch, self.tf = quick, torch, transformers
        self.libraries: dict[str, Any] = {"ours": afina, "theirs": peft}
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def rounds(self, count: int) -> int:
        """Samples of each contestant."""
        return 1 if self.quick else count

    def base(self, kind: str, layers: int = 6) -> Any:
        """A model with random weights."""
        self.torch.manual_seed(0)
        tf, wide = self.tf, 24 if self.quick else 384 if kind == "MiniLM" else 768
        layers, heads = (1, 2) if self.quick else (layers, 12)
        if kind == "MiniLM":
            return tf.BertForSequenceClassification(tf.BertConfig(
                vocab_size=3000, hidden_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=4 * wide, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            ))  # fmt: skip
        return tf.GPT2LMHeadModel(tf.GPT2Config(
            vocab_size=3000, n_layer=layers, n_embd=wide, n_head=heads, bos_token_id=1, eos_token_id=1, pad_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        ))  # fmt: skip

    def adapted(self, base: Any, who: str, count: int) -> Any:
        """The base with adapters a0, a1, ... of a library."""
        torch, library = self.torch, self.libraries[who]
        targets = ["query", "key", "value", "dense"] if hasattr(base, "bert") else ["c_attn", "c_proj", "c_fc"]
        made = lambda: library.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        model = library.get_peft_model(copy.deepcopy(base), made(), "a0")
        for i in range(1, count):
            model.add_adapter(f"a{i}", made())
        for i in range(count):  # the same values in both, in the order of their layers
            torch.manual_seed(i)
            for letter in "AB":
                for p in self.factors(model, f"a{i}", letter):
                    with torch.no_grad():
                        p.copy_(torch.randn(p.shape) * 0.02)
        return model.eval()

    @staticmethod
    def factors(model: Any, name: str, letter: str) -> list[Any]:
        """The factors A or B of one adapter, layer by layer."""
        ours, theirs = f".adapters.{name}.lora_{letter}", f".lora_{letter}.{name}.weight"
        return [p for path, p in model.named_parameters() if path.endswith((ours, theirs))]


# --- a: a batch of many adapters


def measure_mixed(bench: Bench) -> list[dict[str, Any]]:
    """Rows a second of a batch of 1, 8 and 50 adapters."""
    rows = []
    cases: tuple[tuple[str, str, int, int, int], ...] = (
        ("MiniLM", "bf16", 50, 50, 32), ("MiniLM", "bf16", 50, 200, 32), ("MiniLM", "fp32", 50, 50, 32),
        ("MiniLM", "bf16", 8, 128, 32), ("GPT-2", "bf16", 50, 50, 32),
    )  # fmt: skip
    for kind, precision, count, size, tokens in cases[:1] if bench.quick else cases:
        count, size = (3, 6) if bench.quick else (count, size)
        base = bench.base(kind)
        models = {who: bench.adapted(base, who, count) for who in bench.libraries}
        rows.append(_inference(bench, models, kind, precision, count, size, tokens))
        rows.append(_training(bench, models["ours"], kind, precision, count, size, tokens))
    return rows


def _forward(bench: Bench, model: Any, ids: Any, precision: str, names: list[str] | None) -> Any:
    given = {} if names is None else {"adapter_names": names}
    with bench.torch.autocast("cpu", bench.torch.bfloat16, enabled=precision == "bf16"):
        return model(input_ids=ids, **given).logits


def _names(count: int, size: int) -> list[str]:
    return [f"a{i * count // size}" for i in range(size)]


def _inference(
    bench: Bench, models: dict[str, Any], kind: str, precision: str, count: int, size: int, tokens: int
) -> dict[str, Any]:
    torch, names = bench.torch, _names(count, size)
    ids = torch.randint(10, 3000, (size, tokens))
    with torch.no_grad():
        one, other = (_forward(bench, model, ids, "fp32", names) for model in models.values())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)

    def contestant(who: str, names: list[str] | None) -> Contestant:
        def run(_: Any) -> None:
            with torch.no_grad():
                _forward(bench, models[who], ids, precision, names)

        return Contestant(run)

    timings = alternate(
        {f"{who}, {how}": contestant(who, given) for who in models for how, given in (("one", None), ("mixed", names))},
        bench.rounds(5),
    )
    return _rates("forward", kind, precision, count, size, tokens, timings)


def _training(bench: Bench, model: Any, kind: str, precision: str, count: int, size: int, tokens: int) -> dict[str, Any]:
    torch, names = bench.torch, _names(count, size)
    ids = torch.randint(10, 3000, (size, tokens))

    def contestant(rows: list[str] | None) -> Contestant:
        def run(_: Any) -> None:
            for i in range(count):
                model.adapters.set_trainable(f"a{i}", rows is not None or i == 0)
            loss = _forward(bench, model, ids, precision, rows).float().square().mean()
            loss.backward()
            model.zero_grad(set_to_none=True)

        return Contestant(run)

    model.train()
    timings = alternate({"ours, one": contestant(None), "ours, mixed": contestant(names)}, bench.rounds(5))
    model.eval()
    return _rates("forward and backward", kind, precision, count, size, tokens, timings)


def _rates(what: str, kind: str, precision: str, count: int, size: int, tokens: int, timings: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "model": kind, "precision": precision, "adapters": count, "rows": size}
    row["tokens"] = tokens
    for clock in ("cpu", "wall"):
        times = {name: timing.median(clock) for name, timing in timings.items()}
        row[f"{clock}_rows_per_s"] = {name: round(size / seconds, 1) for name, seconds in times.items()}
        row[f"{clock}_of_one"] = {
            who: round(times[f"{who}, one"] / times[f"{who}, mixed"], 3)
            for who in ("ours", "theirs")
            if f"{who}, one" in times
        }
    row["met"] = row["cpu_of_one"]["ours"] >= HALF
    return row


# --- b: switching and swapping


def measure_switch(bench: Bench) -> list[dict[str, Any]]:
    """`set_adapter`, `hotswap_adapter`: milliseconds, and how often a compiled model is compiled in the meantime."""
    from peft.utils.hotswap import hotswap_adapter as theirs_swaps

    import afina

    count = 3 if bench.quick else SWITCHED
    models = {who: bench.adapted(bench.base("MiniLM"), who, count) for who in bench.libraries}
    swaps: dict[str, Callable[..., None]] = {"ours": afina.hotswap_adapter, "theirs": theirs_swaps}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models["theirs"].save_pretrained(folder)

        def switching(who: str) -> Contestant:
            def run(_: Any) -> None:
                for i in range(count):
                    models[who].set_adapter(f"a{i}")

            return Contestant(run)

        def swapping(who: str) -> Contestant:
            swap: Any = swaps[who]
            return Contestant(lambda _: swap(models[who], str(Path(folder) / "a1"), "a0"))

        ids = bench.torch.randint(10, 3000, (3, 7))
        for what, made, calls in (("set_adapter", switching, count), ("hotswap_adapter", swapping, 1)):
            timings = alternate({who: made(who) for who in models}, bench.rounds(9))
            row: dict[str, Any] = {"what": what}
            for clock in ("cpu", "wall"):
                ms = {who: timing.median(clock) * 1e3 / calls for who, timing in timings.items()}
                row[f"{clock}_ms"] = {who: round(value, 3) for who, value in ms.items()}
                row[f"{clock}_ratio"] = round(ms["ours"] / ms["theirs"], 3)
            acts = {who: made(who).run for who in models} if what == "hotswap_adapter" else {}
            row["compiled"] = {who: _compilations(bench, models[who], count, ids, acts.get(who)) for who in models}
            rows.append(row)
    return rows


def _compilations(bench: Bench, model: Any, count: int, ids: Any, swap: Callable[[Any], Any] | None) -> int:
    """How often a model is compiled over all its adapters, or over as many swaps; no limit is set to it."""
    torch = bench.torch
    torch._dynamo.reset()
    compilations = [0]

    def backend(graph: Any, _: Any) -> Any:
        compilations[0] += 1
        return graph.forward

    model.set_adapter("a0")
    compiled = torch.compile(model, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=1000), torch.no_grad():
        compiled(input_ids=ids)
        graphs = compilations[0]  # of one pass; a model may be cut into several
        for i in range(count):
            model.set_adapter(f"a{i}") if swap is None else swap(None)
            compiled(input_ids=ids)
    torch._dynamo.reset()
    return round((compilations[0] - graphs) / graphs)


# --- c: torch.compile in training


def measure_compile(bench: Bench) -> list[dict[str, Any]]:
    """Training steps with compiled blocks and without, lengths changing from step to step; compile time counted."""
    rows = []
    for kind in ("MiniLM", "GPT-2"):
        torch = bench.torch
        model = bench.adapted(bench.base(kind), "ours", 1).train()
        model.set_adapter("a0")
        base = model.get_base_model()
        blocks = base.bert.encoder.layer if kind == "MiniLM" else base.transformer.h
        batches = [torch.randint(10, 3000, (4 if bench.quick else 16, tokens)) for tokens in (13, 24, 32, 41, 55)]

        def steps(_: Any, model: Any = model, batches: Any = batches) -> None:
            for ids in batches:
                _forward(bench, model, ids, "bf16", None).float().square().mean().backward()
                model.zero_grad(set_to_none=True)

        torch._dynamo.reset()
        for block in blocks:
            block.compile(dynamic=True, backend="aot_eager" if bench.quick else "inductor")
        start = time.perf_counter()
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):  # blocks that differ in their number are alike
            steps(None)
        compiling = time.perf_counter() - start
        compiled = [block._compiled_call_impl for block in blocks]

        def switched(on: bool, blocks: Any = blocks, compiled: Any = compiled) -> None:
            for block, call in zip(blocks, compiled, strict=True):
                block._compiled_call_impl = call if on else None

        timings = alternate(
            {"off": Contestant(steps, lambda: switched(False)), "on": Contestant(steps, lambda: switched(True))},
            bench.rounds(5),
        )
        wall, cpu = ({how: t.median(clock) / len(batches) for how, t in timings.items()} for clock in ("wall", "cpu"))
        compiling -= wall["on"] * len(batches)
        gained = cpu["off"] - cpu["on"]
        rows.append({
            "model": kind, "cpu_ms": {how: round(s * 1e3, 1) for how, s in cpu.items()},
            "wall_ms": {how: round(s * 1e3, 1) for how, s in wall.items()}, "cpu_rate": round(cpu["off"] / cpu["on"], 3),
            "compiling_s": round(compiling, 1), "steps_to_pay": round(compiling / gained) if gained > 0 else None,
        })  # fmt: skip
        torch._dynamo.reset()
    return rows


SECTIONS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "mixed": measure_mixed, "switch": measure_switch, "compile": measure_compile,
}  # fmt: skip


# --- the document


def render(results: dict[str, Any]) -> str:
    """The tables of the document, from the numbers that were measured."""
    a, s = results["about"], results["sections"]
    versions = ", ".join(f"{name} {v}" for name, v in a["versions"].items())
    parts = [
        f"Measured on {a['date']}: {a['cpu']}, {a['cores']} cores, {a['threads']} thread(s), {a['system']}, "
        f"Python {a['python']}; {versions}. Rates are of medians of process CPU time.",
    ]
    if "mixed" in s:
        body = []
        for r in s["mixed"]:
            rate, of_one = r["cpu_rows_per_s"], r["cpu_of_one"]
            batch = f"{r['model']}, {r['precision']}, {r['rows']} rows of {r['tokens']} tokens, {r['what']}"
            theirs = [""] * 3
            if "theirs" in of_one:
                theirs = [rate["theirs, one"], rate["theirs, mixed"], f"{of_one['theirs']:.2f}"]
            body.append([batch, r["adapters"], rate["ours, one"], rate["ours, mixed"], f"**{of_one['ours']:.2f}**", *theirs,
                         "yes" if r["met"] else "no"])  # fmt: skip
        head = ["", "adapters", "rows/s with one", "mixed", "share", "PEFT: with one", "mixed", "share", "met"]
        parts += [
            "### A batch of many adapters",
            "The limit is 1: a mixture multiplies what one adapter multiplies, and reads more factors. Target: at least "
            f"{HALF} of the rate of the same batch with one adapter. PEFT does not train such batches.",
            table(head, body),
        ]
    if "switch" in s:
        body = [
            [r["what"], *(f"{r['cpu_ms'][who]:.2f}" for who in ("ours", "theirs")), f"**{r['cpu_ratio']:.2f}**",
             r["compiled"]["ours"], r["compiled"]["theirs"]] for r in s["switch"]
        ]  # fmt: skip
        head = ["", "ms, ours", "theirs", "ratio", "compilations, ours", "theirs"]
        parts += [
            "### Switching and swapping",
            f"MiniLM's architecture; compilations after the first one, over {SWITCHED} adapters of one shape. A swap of "
            "ours checks every key, shape and option and the base's fingerprint before anything is written.",
            table(head, body),
        ]
    if "compile" in s:
        body = [
            [r["model"], r["cpu_ms"]["off"], r["cpu_ms"]["on"], f"**{r['cpu_rate']:.2f}**", f"{r['compiling_s']:.0f}",
             "never" if r["steps_to_pay"] is None else f"{r['steps_to_pay']:,}"] for r in s["compile"]
        ]  # fmt: skip
        head = ["", "ms a step, off", "on", "rate", "compiling, s", "steps until it pays"]
        parts += [
            "### torch.compile in training",
            "LoRA r=8 on all linear layers, 16 rows, lengths from 13 to 55 tokens changing from step to step, bf16, each "
            "block compiled with `dynamic=True`.",
            table(head, body),
        ]
    return "\n\n".join(parts)


def main() -> None:
    """Measure, or render."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--quick", action="store_true", help="everything small and few samples: a test, not a measurement")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    options = parser.parse_args()
    if options.markdown:
        put_into(options.markdown, "adapters", render(read_json(options.output)))
        return
    if options.quick and options.output == RESULTS:
        parser.error("--quick measures nothing worth keeping: give another --output than the file of results")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bench = Bench(options.quick)
    sections: dict[str, Any] = {}
    if options.only and options.output.is_file():
        sections = read_json(options.output)["sections"]
    for name in options.only or SECTIONS:
        start = time.perf_counter()
        sections[name] = SECTIONS[name](bench)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        for row in sections[name]:
            print("  ", json.dumps({k: v for k, v in row.items() if not k.startswith("wall")}), flush=True)
    write_json(options.output, {"about": about(PACKAGES, bench.torch.get_num_threads()), "sections": sections})


if __name__ == "__main__":
    main()
