"""How near a plan of memory comes to what the run then takes: `python benchmarks/memory_plan.py`.

Each setting is a whole run of `afina train` with a limit of memory, on a model with random weights and in a process of its
own: loading, three steps, evaluation, test, saving, reading back. In front of it, in the same process, stands the plan of
its recipe. Measured is the resident memory that the run adds at most (the kernel's high-water mark); planned is the plan
without the process itself. Takes about 20 minutes on one core. `--markdown FILE` writes the table into a document; names of
settings run those alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import parser_of, put_into

# Where tables are large they are tied to the head, which reads them whole: of a table in a mapped file only the rows that
# are looked up ever come into memory.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["AFINA_CACHE"] = "off"

BERT = {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 2003}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 6, "n_head": 12}
LLAMA = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16,
         "num_key_value_heads": 4, "intermediate_size": 2816, "vocab_size": 32000, "tie_word_embeddings": True}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 768, "d_ff": 2048, "num_layers": 4, "num_heads": 12, "decoder_start_token_id": 0,
      "feed_forward_proj": "gated-gelu", "vocab_size": 32128, "tie_word_embeddings": True}  # fmt: skip
OPT = {"model_type": "opt", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "ffn_dim": 4096,
       "word_embed_proj_dim": 1024}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 768, "n_layer": 4, "n_head": 12, "vocab_size": 100000}

CLASSIFY, CONTINUE, TURN = "sequence_classification", "causal_lm", "seq2seq"
# name -> architecture, task, tokens a row, changes to the recipe
SETTINGS: dict[str, tuple[dict, str, int, dict]] = {
    "bert-fp32": (BERT, CLASSIFY, 128, {"batch_size": 16}),
    "bert-bf16": (BERT, CLASSIFY, 128, {"batch_size": 16, "precision": "bf16"}),
    "bert-long": (BERT, CLASSIFY, 512, {"batch_size": 4}),
    "bert-last-layers": (BERT, CLASSIFY, 128, {"batch_size": 16, "method": {"name": "last_layers", "num_layers": 2}}),
    "bert-prefix": (BERT, CLASSIFY, 128, {"batch_size": 8, "method": {"name": "prefix_tuning", "num_virtual_tokens": 20}}),
    "gpt2-fp32": (GPT2, CONTINUE, 128, {"batch_size": 8}),
    "gpt2-parts": (GPT2, CONTINUE, 256, {"batch_size": 8, "gradient_accumulation": 4}),
    "gpt2-checkpointing": (GPT2, CONTINUE, 256, {"batch_size": 8, "gradient_checkpointing": True}),
    "llama-fp32": (LLAMA, CONTINUE, 128, {"batch_size": 4}),
    "llama-bf16": (LLAMA, CONTINUE, 128, {"batch_size": 8, "precision": "bf16", "weights": "bf16"}),
    "llama-int8": (LLAMA, CONTINUE, 128, {"batch_size": 4, "weights": "int8"}),
    "llama-nf4": (LLAMA, CONTINUE, 128, {"batch_size": 4, "weights": "nf4", "gradient_checkpointing": True}),
    "llama-nf4-bf16": (LLAMA, CONTINUE, 256, {"batch_size": 4, "weights": "nf4", "precision": "bf16"}),
    "t5-fp32": (T5, TURN, 96, {"batch_size": 8}),
    "t5-int8-bf16": (T5, TURN, 96, {"batch_size": 16, "weights": "int8_weight_only", "precision": "bf16"}),
    "opt-fp32": (OPT, CONTINUE, 128, {"batch_size": 4}),
    "opt-8bit-optimizer": (OPT, CONTINUE, 128, {"batch_size": 8, "optimizer": "adamw_8bit"}),
    "bloom-vocabulary": (BLOOM, CONTINUE, 64, {"batch_size": 8}),
}  # fmt: skip


def prepare_inputs(folder: Path, name: str) -> Path:
    """The model, its tokenizer, the rows and the recipe of a setting; returns the recipe."""
    import torch
    import transformers as tf
    import yaml
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    sizes, task, length, changes = SETTINGS[name]
    words = ["<unk>", "<pad>", "</s>", *(f"w{i}" for i in range(500))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    config = tf.AutoConfig.for_model(**sizes, pad_token_id=1, eos_token_id=2, bos_token_id=2)
    torch.manual_seed(0)
    auto = {CLASSIFY: tf.AutoModel, CONTINUE: tf.AutoModelForCausalLM, TURN: tf.AutoModelForSeq2SeqLM}[task]
    dtype = torch.bfloat16 if changes.get("weights") == "bf16" else torch.float32
    auto.from_config(config, dtype=dtype).save_pretrained(folder / "model")
    chance, rows = random.Random(0), []
    batch = changes["batch_size"]
    for i in range(7 * batch):
        text = " ".join(chance.choices(words[3:], k=length - 1))
        halves = text.split()[: length // 2 - 4], text.split()[length // 2 :]
        if task == CLASSIFY:
            rows.append({"text": text, "label": "ab"[i % 2]})
        elif task == CONTINUE:
            rows.append({"instruction": " ".join(halves[0]), "output": " ".join(halves[1])})
        else:
            rows.append({"text": text, "label": " ".join(chance.choices(words[3:], k=length // 2))})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(folder / "model"),
        "task": {"name": task, **({"template": "bare"} if task == CONTINUE else {})},
        "data": {"file": str(folder / "rows.jsonl"), "validation": 2 / 7, "test": 2 / 7},
        "method": changes.get("method", "lora"),
        "training": {"epochs": 1, "precision": "fp32", "max_length": length, "max_truncated": 1.0},
        "memory": {"limit": "100GB"},  # memory counts, so what is freed goes back at once
    }
    for key, value in changes.items():
        if key != "method":
            recipe["memory" if key in ("weights", "gradient_checkpointing") else "training"][key] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def planned_and_measured(path: Path) -> dict:
    """The plan of a recipe, and what the run adds to this process."""
    from afina.cli.show import quiet

    quiet()
    import torch

    from afina.memory.measure import measured
    from afina.training.plan import planner_for
    from afina.training.recipe import read_recipe
    from afina.training.run import prepare

    began = time.perf_counter()
    recipe = read_recipe(path)
    planner = planner_for(recipe, "cpu")
    footprint = planner.plan(recipe)
    seconds = time.perf_counter() - began
    del planner
    with measured(torch.device("cpu")) as peak:
        run = prepare(read_recipe(path), path.parent / "run")
        run.execute()
    parts = footprint.moments[footprint.decisive].device
    return {
        "planned": footprint.total - parts["process"], "measured": peak.added, "moment": footprint.decisive,
        "seconds": seconds, "parts": {k: v for k, v in parts.items() if k != "process"},
    }  # fmt: skip


def main() -> None:
    """Run every setting, or those that are named, and print the table."""
    parser = parser_of(__doc__.splitlines()[0], renders=False)
    parser.add_argument("names", nargs="*", help=f"of: {', '.join(SETTINGS)}")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare:
        print(prepare_inputs(Path(given.prepare[0]), given.prepare[1]))
        return
    if given.one:
        print(json.dumps(planned_and_measured(given.one)))
        return
    found = {}
    for name in given.names or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            path = _alone("--prepare", folder, name)
            found[name] = json.loads(_alone("--one", path))
        one = found[name]
        print(f"{name:20} planned {one['planned'] / 1e6:7.0f} MB  measured {one['measured'] / 1e6:7.0f} MB  "
              f"ratio {one['planned'] / one['measured']:.3f}  {one['moment']}  {one['seconds']:.1f} s  "
              f"{ {k: round(v / 1e6) for k, v in one['parts'].items()} }", flush=True)  # fmt: skip
    if given.markdown:
        _write(given.markdown, found)


def _alone(*arguments: str) -> str:
    """A step in a process of its own; the last line it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def _write(document: Path, found: dict[str, dict]) -> None:
    import platform
    from importlib.metadata import version

    lines = ["| setting | planned | measured | planned / measured |", "|---|---|---|---|"]
    for name, one in found.items():
        ratio = one["planned"] / one["measured"]
        lines.append(f"| {name} | {one['planned'] / 1e6:,.0f} MB | {one['measured'] / 1e6:,.0f} MB | {ratio:.2f} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes", "torchao"))
    ratios = [one["planned"] / one["measured"] for one in found.values()]
    lines += ["", f"{len(found)} settings, ratios from {min(ratios):.2f} to {max(ratios):.2f}. {platform.machine()}, "
              f"{platform.system()}, one thread, {versions}."]  # fmt: skip
    put_into(document, "memory_plan", "\n".join(lines))


if __name__ == "__main__":
    main()
