"""afina's core beside Hugging Face PEFT, in one process: injection, loading, overhead, memory, files.

    python benchmarks/core.py                                   measure, write benchmarks/results/core.json
    python benchmarks/core.py --markdown docs/benchmarks.md     render what was measured last into the document

Set OMP_NUM_THREADS=1 for numbers that other processes disturb least. `--only load memory` runs some sections (the others
keep the numbers they have), `--quick` runs everything small, to see that it works.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import Contestant, Timing, about, alternate, geometric_mean, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "core.json"
FASTER, LEANER = 0.5, 0.7  # targets: share of PEFT's time, share of PEFT's overhead
PACKAGES = ("afina", "peft", "torch", "transformers")
LOW = "theirs, low_cpu_mem_usage=True"


class Bench:
    """The libraries, and how much to measure."""

    def __init__(self, quick: bool):
        import peft
        import torch

        import afina

        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()  # what was imported need not be searched before every sample
        self.torch, self.afina, self.peft, self.quick = torch, afina, peft, quick

    def rounds(self, full: int) -> int:
        """How many samples to take."""
        return 2 if self.quick else full

    def llama(self, layers: int, hidden: int, *, meta: bool = False, vocabulary: int = 256) -> Any:
        """A Llama of random weights, with the proportions of Llama-2-7B."""
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = max(2, hidden // 128)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, use_cache=False,
        )  # fmt: skip
        with self.torch.device("meta" if meta else "cpu"):
            return LlamaForCausalLM(config)

    def lora(self, library: Any, targets: Any, **options: Any) -> Any:
        """The same LoRA configuration in either library."""
        return library.LoraConfig(r=8, lora_alpha=16, target_modules=targets, **options)


def compared(case: str, timings: dict[str, Timing], target: float | None) -> dict[str, Any]:
    """One row of results: medians in milliseconds and the ratio to the faster of PEFT's ways."""
    row: dict[str, Any] = {"case": case, "samples": len(timings["ours"].cpu)}
    for clock in ("cpu", "wall"):
        medians = {name: timing.median(clock) * 1e3 for name, timing in timings.items()}
        row[f"{clock}_ms"] = {name: round(ms, 4) for name, ms in medians.items()}
        row[f"{clock}_ratio"] = round(medians["ours"] / min(ms for name, ms in medians.items() if name != "ours"), 3)
    return row | ({} if target is None else {"target": target, "met": row["cpu_ratio"] <= target})


# --- a: injection


def measure_inject(bench: Bench) -> list[dict[str, Any]]:
    """LoRA r=8 into Llama-2-7B's architecture on the meta device."""
    layers = 2 if bench.quick else 32
    rows = []
    for targets in (["q_proj", "v_proj"], "all-linear"):

        def inject(library: Any, targets: Any = targets, **options: Any) -> Contestant:
            config = bench.lora(library, targets, task_type="CAUSAL_LM")
            return Contestant(
                lambda model: library.get_peft_model(model, copy.deepcopy(config), **options),
                lambda: bench.llama(layers, 4096, meta=True, vocabulary=32000),
            )

        timings = alternate(
            {"ours": inject(bench.afina), "theirs": inject(bench.peft), LOW: inject(bench.peft, low_cpu_mem_usage=True)},
            bench.rounds(15),
        )
        name = targets if isinstance(targets, str) else ", ".join(targets)
        rows.append(compared(f"{layers} layers, {name}", timings, FASTER))
    return rows


# --- b: loading


def measure_load(bench: Bench) -> list[dict[str, Any]]:
    """One adapter onto a bare model, a second one, and the fiftieth."""
    many = 3 if bench.quick else 50
    base = bench.llama(2 if bench.quick else 16, 64)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = bench.lora(bench.afina, ["q_proj", "v_proj"], task_type="CAUSAL_LM")
        bench.afina.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)

        def onto_bare(library: Any, **options: Any) -> Contestant:
            load = library.PeftModel.from_pretrained
            return Contestant(lambda model: load(model, folder, **options), lambda: copy.deepcopy(base))

        def one_more(library: Any, present: int, **options: Any) -> Contestant:
            model = library.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="a0")
            for i in range(1, present):
                model.load_adapter(folder, f"a{i}", **options)

            def clear() -> None:
                if "new" in model.peft_config:
                    model.delete_adapter("new")

            return Contestant(lambda _: model.load_adapter(folder, "new", **options), clear)

        for case, make in (
            ("the first, onto a bare model", onto_bare),
            ("the second", lambda library, **options: one_more(library, 1, **options)),
            (f"the {many}th, {many - 1} there already", lambda library, **options: one_more(library, many - 1, **options)),
        ):
            contestants = {"ours": make(bench.afina), "theirs": make(bench.peft)}
            contestants[LOW] = make(bench.peft, low_cpu_mem_usage=True)
            rows.append(compared(case, alternate(contestants, bench.rounds(21)), FASTER))
    for row in rows:
        row["against_second"] = {n: round(ms / rows[1]["cpu_ms"][n], 2) for n, ms in row["cpu_ms"].items()}
    return rows


# --- c: overhead


def measure_overhead(bench: Bench) -> list[dict[str, Any]]:
    """What LoRA adds to a forward pass and to a training step, on single layers and on a small Llama.

    The base alone is the same model, frozen; the input takes gradients, as in the middle of a model. The base's training
    step goes back to that input, and its optimizer steps over tensors of the adapters' shapes: what is left is what the
    adapters cost.
    """
    torch = bench.torch
    widths, tokens = ((64,), (32,)) if bench.quick else ((64, 256, 1024), (32, 128, 512))
    rows = []
    for p, width, rows_in in itertools.product((0.0, 0.1), widths, tokens):
        base = torch.nn.Sequential(torch.nn.Linear(width, width)).requires_grad_(False)
        x, g = torch.randn(rows_in, width), torch.randn(rows_in, width)
        rows += _overhead(bench, base, ["0"], p, {"input": x}, g, f"Linear {width}, {rows_in} rows")
    hidden, layers = (64, 1) if bench.quick else (256, 4)
    for p, targets in itertools.product((0.0, 0.1), (["q_proj", "v_proj"], "all-linear")):
        base = bench.llama(layers, hidden).requires_grad_(False)
        x = torch.randn(2, 32, hidden)
        name = targets if isinstance(targets, str) else ", ".join(targets)
        case = f"Llama of {layers} layers, width {hidden}, 2 x 32 tokens, {name}"
        rows += _overhead(bench, base, targets, p, {"inputs_embeds": x}, torch.randn(2, 32, 256), case)
    return rows


def _overhead(
    bench: Bench, base: Any, targets: Any, p: float, inputs: dict[str, Any], g: Any, case: str
) -> list[dict[str, Any]]:
    torch = bench.torch
    models = {"base": base}
    for name, library in (("ours", bench.afina), ("theirs", bench.peft)):
        twin = copy.deepcopy(base, {id(w): w for w in base.parameters()})  # the same weights, at the same place in memory
        adapted = library.get_peft_model(twin, bench.lora(library, targets, lora_dropout=p))
        models[name] = adapted.base_model.model
    trained = {name: [w for w in m.parameters() if w.requires_grad] for name, m in models.items()}
    assert [w.shape for w in trained["ours"]] == [w.shape for w in trained["theirs"]]
    trained["base"] = [torch.nn.Parameter(torch.zeros_like(w)) for w in trained["ours"]]
    standing = [torch.zeros_like(w) for w in trained["base"]]
    key, value = next(iter(inputs.items()))
    whole = key == "inputs_embeds"
    rounds = bench.rounds(81 if whole else 41)

    def call(model: Any, x: Any) -> Any:
        return model(inputs_embeds=x).logits if whole else model(x)

    def forward(name: str) -> Contestant:
        model, x = models[name].train(), value.clone().requires_grad_()
        return Contestant(lambda _: call(model, x))

    def step(name: str) -> Contestant:
        model, x = models[name].train(), value.clone().requires_grad_()
        optimizer = torch.optim.AdamW(trained[name], lr=1e-4, fused=True)

        def run(_: Any) -> None:
            x.grad = None
            call(model, x).backward(g)
            if name == "base":
                for w, gradient in zip(trained["base"], standing, strict=True):
                    w.grad = gradient
            optimizer.step()
            optimizer.zero_grad()

        return Contestant(run)

    rows = []
    for kind, make in (("forward", forward), ("training step", step)):
        timings = alternate({n: make(n) for n in models}, rounds, slice_s=0.003, warmup=3)
        row: dict[str, Any] = {"case": case, "dropout": p, "kind": kind, "whole_model": whole, "samples": rounds}
        for clock in ("cpu", "wall"):
            us = {name: timing.median(clock) * 1e6 for name, timing in timings.items()}
            ours, theirs = us["ours"] - us["base"], us["theirs"] - us["base"]
            row[f"{clock}_us"] = {"base": round(us["base"], 1), "ours": round(ours, 1), "theirs": round(theirs, 1)}
            row[f"{clock}_ratio"] = round(ours / theirs, 3) if theirs > 0 else None
        rows.append(row)
    return rows


# --- d: memory


def measure_memory(bench: Bench) -> list[dict[str, Any]]:
    """Bytes an adapted layer keeps for backward that the base alone does not keep; parameters are not counted."""
    torch = bench.torch
    n_in, n_out, tokens = 256, 192, 128
    rows = []
    for name, kind, options in (
        ("LoRA", "LoraConfig", {"r": 8}),
        ("LoRA, dropout 0.1", "LoraConfig", {"r": 8, "lora_dropout": 0.1}),
        ("DoRA", "LoraConfig", {"r": 8, "use_dora": True}),
        ("(IA)3", "IA3Config", {"feedforward_modules": []}),
        ("HRA", "HRAConfig", {"r": 8}),
    ):
        x = torch.randn(tokens, n_in, requires_grad=True)
        base = torch.nn.Sequential(torch.nn.Linear(n_in, n_out)).requires_grad_(False)
        kept = {"base": _kept_bytes(torch, base, x)}
        for who, library in (("ours", bench.afina), ("theirs", bench.peft)):
            adapted = library.get_peft_model(copy.deepcopy(base), getattr(library, kind)(target_modules=["0"], **options))
            kept[who] = _kept_bytes(torch, adapted.base_model.model.train(), x)
        ours, theirs = (kept[who] - kept["base"] for who in ("ours", "theirs"))
        rows.append({
            "case": f"{name}, Linear {n_in} to {n_out}, {tokens} rows", "bytes": {"ours": ours, "theirs": theirs},
            "inputs": {"ours": round(ours / x.nbytes, 2), "theirs": round(theirs / x.nbytes, 2)},
            "ratio": round(ours / theirs, 3),
        })  # fmt: skip
    return rows


def _kept_bytes(torch: Any, model: Any, x: Any) -> int:
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in own)


# --- e: files, imports, the round trip


def measure_files(bench: Bench) -> list[dict[str, Any]]:
    """Trainable parameters and bytes of `adapter_model.safetensors`."""
    rows = []
    for targets in (["q_proj", "v_proj"], "all-linear"):
        row: dict[str, Any] = {"case": f"Llama of 4 layers, width 256, {targets}", "parameters": {}, "file_bytes": {}}
        for who, library in (("ours", bench.afina), ("theirs", bench.peft)):
            model = library.get_peft_model(bench.llama(4, 256), bench.lora(library, targets, task_type="CAUSAL_LM"))
            row["parameters"][who] = model.get_nb_trainable_parameters()[0]
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                row["file_bytes"][who] = (Path(folder) / "adapter_model.safetensors").stat().st_size
        rows.append(row)
    return rows


def measure_round_trip(bench: Bench) -> list[dict[str, Any]]:
    """`get_peft_model`, `save_pretrained` and `from_pretrained` onto a second copy of the base."""
    base = bench.llama(2 if bench.quick else 8, 64)

    def trip(library: Any) -> Contestant:
        def run(models: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                config = bench.lora(library, ["q_proj", "v_proj"], task_type="CAUSAL_LM")
                library.get_peft_model(models[0], config).save_pretrained(folder)
                library.PeftModel.from_pretrained(models[1], folder)

        return Contestant(run, lambda: (copy.deepcopy(base), copy.deepcopy(base)))

    timings = alternate({"ours": trip(bench.afina), "theirs": trip(bench.peft)}, bench.rounds(15))
    return [compared("Llama of 8 layers, width 64", timings, None)]


def measure_import(bench: Bench) -> list[dict[str, Any]]:
    """A new Python that imports the package, and one that also fetches what one needs to adapt a model."""
    if bench.quick:
        return []
    rows = []
    for case, line in (("import {}", "import {}"), ("and two names of it", "from {} import LoraConfig, get_peft_model")):
        timings = {"ours": Timing(), "theirs": Timing()}
        for number in range(-1, 7):
            for who, package in (("ours", "afina"), ("theirs", "peft")):
                before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                subprocess.run([sys.executable, "-c", line.format(package)], check=True, capture_output=True)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                if number >= 0:
                    timings[who].wall.append(time.perf_counter() - start)
                    timings[who].cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        rows.append(compared(case.format("the package"), timings, None))
    return rows


SECTIONS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "inject": measure_inject,
    "load": measure_load,
    "overhead": measure_overhead,
    "memory": measure_memory,
    "files": measure_files,
    "round_trip": measure_round_trip,
    "import": measure_import,
}


# --- the document


def render(results: dict[str, Any]) -> str:
    """The tables of the document, from the numbers that were measured."""
    a, s = results["about"], results["sections"]
    versions = ", ".join(f"{name} {v}" for name, v in a["versions"].items())
    parts = [
        f"Measured on {a['date']}: {a['cpu']}, {a['cores']} cores, {a['threads']} thread(s), {a['system']}, "
        f"Python {a['python']}; {versions}.",
        "Times are medians of process CPU time; a second column has the ratio of wall times, which other work on the "
        "machine disturbs. `low` is PEFT with `low_cpu_mem_usage=True`; ratios are to the faster of its two ways.",
        "### Putting LoRA into a model",
        f"Llama-2-7B's architecture, r=8, meta device. Target: at most {FASTER} of PEFT's time.",
        _times(s["inject"]),
        "### Loading an adapter",
        f"LoRA r=8 on q_proj and v_proj of a Llama of 16 layers, from a folder. Target: at most {FASTER} of PEFT's time, "
        "and not growing with the number of adapters.",
        _times(s["load"], extra=("against the second: ours", "theirs", "low"), of=lambda r: _three(r["against_second"])),
    ]
    parts += ["### What LoRA adds to a forward pass and a training step", _overhead_words(s["overhead"])]
    for p in (0.0, 0.1):
        parts += [f"Dropout {p}:", _overhead_table([r for r in s["overhead"] if r["dropout"] == p])]
    parts += [
        "### Kept for backward",
        "Bytes one adapted layer keeps that the layer alone does not; parameters are not counted, the layer's input is.",
        table(
            ["", "ours", "theirs", "ratio", "ours, in inputs", "theirs"],
            [[r["case"], *(f"{b:,}" for b in r["bytes"].values()), r["ratio"], *r["inputs"].values()] for r in s["memory"]],
        ),
        "### Files",
        table(
            ["", "trainable, ours", "theirs", "file in bytes, ours", "theirs"],
            [[r["case"], *(f"{n:,}" for n in (*r["parameters"].values(), *r["file_bytes"].values()))] for r in s["files"]],
        ),
        "### get_peft_model, save_pretrained and from_pretrained in a row",
        _times(s["round_trip"]),
    ]
    if s["import"]:
        parts += ["### Import", "A new Python process each time.", _times(s["import"])]
    return "\n\n".join(parts)


def render_short(results: dict[str, Any]) -> str:
    """The few lines of the README."""
    a, s = results["about"], results["sections"]
    rows: list[list[Any]] = [
        [f"LoRA into Llama-2-7B's architecture, {s['inject'][-1]['case']} (time)", s["inject"][-1]["cpu_ratio"]],
        ["loading the second adapter (time)", s["load"][1]["cpu_ratio"]],
        ["loading the 50th (time)", s["load"][-1]["cpu_ratio"]],
    ]
    rows += [
        [f"what LoRA adds: {name} (time, mean)", v["mean"]]
        for name, v in summary(s["overhead"]).items()
        if name.endswith("0.0")
    ]
    rows += [
        [f"kept for backward: {r['case']} (bytes)", r["ratio"]]
        for r in s["memory"]
        if "dropout" in r["case"] or "DoRA" in r["case"]
    ]
    ours, theirs = a["versions"]["afina"], a["versions"]["peft"]
    head = f"afina {ours} over PEFT {theirs}, one process, in turn, medians; {a['cpu']}, {a['threads']} thread:"
    return f"{head}\n\n" + table(["", "ours / theirs"], [[name, f"{ratio:.2f}"] for name, ratio in rows])


def _three(values: dict[str, Any]) -> list[Any]:
    return [values.get(name, "") for name in ("ours", "theirs", LOW)]


def _times(rows: list[dict[str, Any]], extra: tuple[str, ...] = (), of: Callable[[Any], list[Any]] = lambda r: []) -> str:
    low = any(LOW in r["cpu_ms"] for r in rows)
    columns = 3 if low else 2
    head = ["", *("ours, ms", "theirs, ms", "low, ms")[:columns], "ratio", "ratio, wall", *extra, "met"]
    body = []
    for r in rows:
        times = [f"{ms:.1f}" for ms in _three(r["cpu_ms"])[:columns]]
        met = {True: "yes", False: "no", None: ""}[r.get("met")]
        body.append([r["case"], *times, f"**{r['cpu_ratio']:.2f}**", f"{r['wall_ratio']:.2f}", *of(r), met])
    return table(head, body)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means of the overhead ratios by kind and dropout, single layers and whole models apart."""
    found = {}
    for whole, kind, p in itertools.product((False, True), ("forward", "training step"), (0.0, 0.1)):
        ratios = [r["cpu_ratio"] for r in rows if (r["whole_model"], r["kind"], r["dropout"]) == (whole, kind, p)]
        ratios = [ratio for ratio in ratios if ratio is not None]
        if ratios:
            name = f"{'a small Llama' if whole else 'single layers'}, {kind}, dropout {p}"
            mean, above = geometric_mean(ratios), sum(ratio > LEANER for ratio in ratios)
            found[name] = {"mean": round(mean, 3), "worst": max(ratios), "above": above, "of": len(ratios)}
    return found


def _overhead_words(rows: list[dict[str, Any]]) -> str:
    body = []
    for name, v in summary(rows).items():
        met = "yes" if v["mean"] <= LEANER else "no"
        body.append([name, f"**{v['mean']:.2f}**", f"{v['worst']:.2f}", f"{v['above']} of {v['of']}", met])
    return (
        f"LoRA r=8. Overhead: time with the adapter less time of the frozen base alone. Target: at most {LEANER} of PEFT's, "
        "here of the geometric mean; rows above it are counted beside it. The input takes gradients, as in the middle of a "
        "model; the base's training step goes back to it, and its "
        "optimizer (fused AdamW) steps over tensors of the adapters' shapes, so that what is left is what the adapters "
        "cost.\n\n" + table(["ratio of overheads", "geometric mean", "worst", f"above {LEANER}", "met"], body)
    )


def _overhead_table(rows: list[dict[str, Any]]) -> str:
    cases: dict[str, dict[str, Any]] = {}
    for r in rows:
        cases.setdefault(r["case"], {})[r["kind"]] = r
    body = []
    for case, kinds in cases.items():
        line: list[Any] = [case]
        for kind in ("forward", "training step"):
            us, ratio = kinds[kind]["cpu_us"], kinds[kind]["cpu_ratio"]
            line += [f"{us['base']:.0f}", f"+{us['ours']:.0f}", f"+{us['theirs']:.0f}"]
            line.append("" if ratio is None else f"**{ratio:.2f}**")
        body.append(line)
    return table(["", "forward, us: base", "ours", "theirs", "ratio", "step, us: base", "ours", "theirs", "ratio"], body)


def main() -> None:
    """Measure, or render."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--quick", action="store_true", help="everything small and few samples: a test, not a measurement")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--short", action="store_true", help="with --markdown: the few lines of the README")
    options = parser.parse_args()
    if options.markdown:
        results = read_json(options.output)
        put_into(options.markdown, "core", render_short(results) if options.short else render(results))
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
            print("  ", json.dumps({k: v for k, v in row.items() if k not in ("wall_ms", "wall_us", "samples")}), flush=True)
    write_json(options.output, {"about": about(PACKAGES, bench.torch.get_num_threads()), "sections": sections})
    if "overhead" in sections:
        for name, values in summary(sections["overhead"]).items():
            print(f"overhead, {name}: {values}")


if __name__ == "__main__":
    main()
