"""What boxes tell: entity F1 on forms where only the place of a word says whether it belongs to a key or to its value.

    OMP_NUM_THREADS=1 python benchmarks/documents.py                    train, write benchmarks/results/documents.json
    python benchmarks/documents.py --markdown docs/benchmarks.md        render what was measured last into the document

Forms are drawn here: fields of one or two words in any order, keys to the left, values to the right, words of a foot below;
all words are drawn from one list. Models have the true architectures, made small, and random weights. Each is trained on the
boxes as they are and on the same boxes dealt anew among the words of each page, which then say nothing; BERT has none.
LayoutLMv3 is also given the pictures of the pages. `--quick` runs everything small, to see that it works.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from harness import about, parser_of, put_into, read_json, table, write_json

RESULTS = Path(__file__).parent / "results" / "documents.json"
PACKAGES = ("afina", "torch", "transformers", "pillow")
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "ru", "so") for b in ("bar", "den", "fil", "gos", "tam")]
SIZE = (424, 600)  # pixels of a page
LEFT, RIGHT, FOOT = (8, 80), (230, 300), 540
MODELS = {"BERT": "bert", "LayoutLM": "layoutlm", "LiLT": "lilt", "LayoutLMv3": "layoutlmv3"}
WAYS = {"boxes": "as they are", "dealt": "dealt anew", "pictures": "as they are, and the picture"}


def form(chance: random.Random, fields: int = 6) -> dict[str, Any]:
    """Words, boxes and tags of a page."""
    parts = [(kind, row) for row in range(fields) for kind in ("KEY", "VALUE")] + [("", 0)] * 2
    chance.shuffle(parts)
    words, boxes, labels = [], [], []
    for kind, row in parts:
        x = chance.randrange(*{"KEY": LEFT, "VALUE": RIGHT, "": (8, 300)}[kind])
        y = 15 + row * 85 + chance.randrange(40) if kind else chance.randrange(FOOT, 580)
        for n in range(chance.randrange(1, 3)):
            words.append(chance.choice(WORDS))
            boxes.append([x, y, x + 50, y + 14])
            labels.append(f"{'I' if n else 'B'}-{kind}" if kind else "O")
            x += 56
    return {"words": words, "boxes": boxes, "labels": labels, "page_size": list(SIZE)}


def drawn(row: dict[str, Any], path: Path) -> None:
    """Write the picture of a page."""
    from PIL import Image, ImageDraw

    page = Image.new("L", SIZE, 255)
    draw = ImageDraw.Draw(page)
    for word, (x, y, *_) in zip(row["words"], row["boxes"], strict=True):
        draw.text((x, y), word, fill=0, font_size=13)
    page.save(path)


def write_rows(folder: Path, count: int) -> None:
    """`boxes.jsonl`, `dealt.jsonl` and `pictures.jsonl`: the same pages."""
    chance = random.Random(0)
    files = {way: (folder / f"{way}.jsonl").open("w", encoding="utf-8") for way in WAYS}
    for n in range(count):
        row = form(chance)
        dealt = {**row, "boxes": chance.sample(row["boxes"], len(row["boxes"]))}
        drawn(row, folder / f"{n}.png")
        for way, content in (("boxes", row), ("dealt", dealt), ("pictures", {**row, "image": f"{n}.png"})):
            files[way].write(json.dumps(content) + "\n")
    for file in files.values():
        file.close()


def save_base(folder: Path, kind: str) -> Path:
    """A small model of random weights, and a tokenizer that knows the words."""
    import torch
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=126,
    )  # fmt: skip
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 384, "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.05,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "bert":
        model: Any = tf.BertModel(tf.BertConfig(**common))
    elif kind == "layoutlm":
        model = tf.LayoutLMModel(tf.LayoutLMConfig(**common))
    elif kind == "lilt":
        model = tf.LiltModel(tf.LiltConfig(**common))
    else:
        size = {"coordinate_size": 16, "shape_size": 16, "input_size": 64, "patch_size": 16}
        model = tf.LayoutLMv3Model(tf.LayoutLMv3Config(**common, **size))
        tf.LayoutLMv3ImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measured(folder: Path, kind: str, way: str, epochs: int) -> dict[str, Any]:
    """Train one model on one kind of rows; entity F1 on the test rows, with its interval."""
    from afina.report.folder import read_run
    from afina.report.scores import intervals
    from afina.training.recipe import DataOptions, Recipe, TrainingOptions
    from afina.training.run import prepare

    base = folder / kind if (folder / kind).is_dir() else save_base(folder / kind, kind)
    tables = ["word_embeddings", "x_position_embeddings", "y_position_embeddings"]  # random weights know no place yet
    if kind == "bert":
        task, tables = {"name": "token_classification"}, tables[:1]
    else:
        task = {"name": "document_token_classification", "boxes": "pixels", "pictures": way == "pictures"}
    recipe = Recipe(
        task=task, model=str(base), data=DataOptions(file=str(folder / f"{way}.jsonl")),
        method={"name": "lora", "r": 16, "target_modules": "all-linear", "modules_to_save": tables},
        training=TrainingOptions(epochs=epochs, batch_size=16, learning_rate=5e-3, precision="fp32"),
    )  # fmt: skip
    start = time.perf_counter()
    run = folder / f"{kind} {way}"
    made = prepare(recipe, run).execute()
    between = intervals(read_run(run)).get("f1", (made["test"]["f1"],) * 2)
    shown = {key: made["test"][key] for key in ("f1", "rows", "entities")}
    return {**shown, "interval": between, "seconds": time.perf_counter() - start}


def render(results: dict[str, Any]) -> str:
    """As Markdown."""

    def cell(name: str, way: str) -> str:
        found = results["runs"].get(f"{name}, {way}")
        low, high = found["interval"] if found else (0, 0)
        return f"{found['f1']:.3f} ({low:.3f} to {high:.3f})" if found else ""

    rows = [[name, *(cell(name, way) for way in WAYS)] for name in MODELS if name != "BERT"]
    one = next(iter(results["runs"].values()))
    said = (
        f"Entity F1 on {one['rows']} test forms with {one['entities']} entities, with 95 % intervals, after training on "
        f"{results['forms']} forms less those and the validation forms. BERT, which reads no boxes: {cell('BERT', 'dealt')}."
    )
    made = results["about"]
    where = f"{made['date']}, {made['cpu']}, {made['threads']} thread, torch {made['versions']['torch']}"
    return f"{said}\n\n{where}.\n\n" + table(["boxes:", *WAYS.values()], rows)


def main() -> None:
    """See above."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--quick", action="store_true", help="everything small")
    asked = parser.parse_args()
    if asked.markdown is not None:
        put_into(asked.markdown, "documents", render(read_json(asked.output)))
        return
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    forms, epochs = (40, 2) if asked.quick else (300, 25)
    runs = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder, forms)
        for name, kind in MODELS.items():
            for way in WAYS:
                if (kind == "bert" and way != "dealt") or (way == "pictures" and kind != "layoutlmv3"):
                    continue
                runs[f"{name}, {way}"] = measured(folder, kind, way, epochs)
                print(f"{name}, {way}: {runs[f'{name}, {way}']}", flush=True)
    results = {"about": about(PACKAGES, torch.get_num_threads()), "forms": forms, "runs": runs}
    if not asked.quick:
        write_json(asked.output, results)
    print(render(results))


if __name__ == "__main__":
    main()
