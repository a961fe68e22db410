"""Small forms, where only its place on the page tells what a word is, and tiny models of documents."""

from __future__ import annotations

import json
import random

import tiny_bases
import torch
import transformers as tf
from PIL import Image, ImageDraw

SIZE = (203, 307)
PLACES = {"KEY": (5, 75), "VALUE": (110, 180)}  # where a field begins, from left
FOOT = 250  # words below it belong to no field
KINDS = ("layoutlm", "layoutlmv3", "lilt")


def form(chance, fields=5, size=SIZE):
    """Words, boxes in pixels and tags of a page: fields in any order, each of one or two words, and a foot."""
    words, boxes, tags, rows, step = [], [], [], list(range(fields)), 230 // fields
    parts = [(kind, row) for row in rows for kind in PLACES] + [("", fields)] * 2
    chance.shuffle(parts)
    for kind, row in parts:
        low, high = PLACES.get(kind, (5, 150))
        x, y = chance.randrange(low, high - 60), 5 + row * step + chance.randrange(step // 2)
        y = y if kind else chance.randrange(FOOT, 290)
        for n in range(chance.randrange(1, 3)):
            words.append(chance.choice(tiny_bases.WORDS))
            boxes.append([x, y, x + 21, y + 11])
            tags.append(f"{'I' if n else 'B'}-{kind}" if kind else "O")
            x += 24
    return words, boxes, tags


def drawn(words, boxes, size=SIZE):
    """The page."""
    page = Image.new("L", size, 255)
    draw = ImageDraw.Draw(page)
    for word, (x0, y0, *_) in zip(words, boxes, strict=True):
        draw.text((x0, y0), word, fill=0)
    return page


def row(chance):
    """A page with its picture."""
    words, boxes, tags = form(chance)
    return {"words": words, "boxes": boxes, "labels": tags, "image": drawn(words, boxes)}


def write_funsd(folder, pages=7, seed=0):
    """`folder/training_data/annotations/N.json` and so on."""
    chance = random.Random(seed)
    for side in ("training_data", "testing_data"):
        for kind in ("annotations", "images"):
            (folder / side / kind).mkdir(parents=True)
        for n in range(pages):
            words, boxes, tags = form(chance)
            fields = []
            for word, box, tag in zip(words, boxes, tags, strict=True):
                if tag.startswith("I-"):
                    fields[-1]["words"].append({"text": word, "box": box})
                else:
                    label = {"KEY": "question", "VALUE": "answer"}.get(tag[2:], "other")
                    fields.append({"label": label, "words": [{"text": word, "box": box}], "linking": [], "id": len(fields)})
            fields[0]["words"].append({"text": "", "box": [0, 0, 0, 0]})
            (folder / side / "annotations" / f"{n}.json").write_text(json.dumps({"form": fields}))
            drawn(words, boxes).save(folder / side / "images" / f"{n}.png")
    return folder


def save_base(folder, kind="layoutlmv3", *, width=24, layers=2, positions=67):
    """A model of documents with random weights and the words of `tiny_bases`."""
    made = tiny_bases.tokenizer()
    made.model_max_length = positions - 1
    common = {
        "vocab_size": len(made), "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
        "intermediate_size": 29, "max_position_embeddings": positions, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "layoutlm":
        model = tf.LayoutLMModel(tf.LayoutLMConfig(**common))
    elif kind == "lilt":
        model = tf.LiltModel(tf.LiltConfig(**common, channel_shrink_ratio=2))
    else:
        parts = {"coordinate_size": width // 6, "shape_size": width // 6, "input_size": 32, "patch_size": 16}
        model = tf.LayoutLMv3Model(tf.LayoutLMv3Config(**common, **parts))
        tf.LayoutLMv3ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
