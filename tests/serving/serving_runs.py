"""Tiny finished runs of every task, made by the real training, and the real app around them."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import random
import threading
import time

import language_bases
import uvicorn
from tiny_bases import TELLING, WORDS, save_bert

from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare

SIGNALS = [word for words in TELLING.values() for word in words]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def texts(count, seed=0):
    chance = random.Random(seed)
    found = {}
    while len(found) < count:
        word = chance.choice(SIGNALS)
        words = [*chance.choices(WORDS, k=chance.randrange(2, 17)), word]
        chance.shuffle(words)
        found[" ".join(words)] = word
    return list(found.items())


def write(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(task, seed):
    """Rows that a tiny model can learn something from."""
    made = texts(59, seed)
    if task == "three":
        return [{"text": t, "label": f"class {SIGNALS.index(w) % 3}"} for t, w in made]
    if task == "number":
        return [{"text": t, "label": len(t.split())} for t, _ in made]
    if task == "several":
        return [{"text": t, "label": ",".join(["late", "long"][: 1 + (len(t.split()) > 9)])} for t, _ in made]
    if task == "tags":
        return [{"text": t, "label": " ".join("B-X" if w in SIGNALS else "O" for w in t.split())} for t, _ in made]
    if task == "spans":
        return [{"question": "where " + w, "context": t, "answer": w} for t, w in made if t.split().count(w) == 1]
    if task == "alike":
        both = zip(made, made[7:] + made[:7], strict=True)
        return [{"text": a, "text_pair": b, "score": i % 5} for i, ((a, _), (b, _)) in enumerate(both)]
    return [{"text": t, "label": "complaint" if w in TELLING["complaint"] else "other"} for t, w in made]


ENCODERS = {  # name -> task, method
    "two": ("sequence_classification", {"name": "lora", "r": 3}),
    "three": ("sequence_classification", {"name": "dora", "r": 5}),
    "number": ("regression", {"name": "ia3"}),
    "several": ("multi_label_classification", {"name": "lora", "r": 2, "bias": "lora_only"}),
    "prompted": ("sequence_classification", {"name": "prompt_tuning", "num_virtual_tokens": 3}),
    "blocks": ("sequence_classification", {"name": "last_layers"}),
    "tags": ("token_classification", {"name": "lora", "r": 3}),
    "spans": ("question_answering", {"name": "lora", "r": 3}),
    "alike": ("sentence_similarity", {"name": "lora", "r": 3}),
}


def run_of(folder, name, base, file, task, method, data=None, **training):
    options = {"epochs": 1, "learning_rate": 3e-2, "precision": "fp32", "max_truncated": 1.0, **training}
    data = {k: v for k, v in {"text": "text", "label": "label", **(data or {})}.items() if v}
    recipe = Recipe(
        model=str(base), data=DataOptions(file=str(file), **data), method=method, task=task,
        training=TrainingOptions(**options),
    )  # fmt: skip
    prepare(recipe, folder / name).execute()
    return folder / name


def make_encoders(folder):
    base, made = save_bert(folder / "bert"), {}
    columns = {
        "spans": {"text": "question", "text_pair": "context", "label": "answer"},
        "alike": {"text_pair": "text_pair", "label": "score"},
    }  # fmt: skip
    for seed, (name, (task, method)) in enumerate(ENCODERS.items()):
        file = write(folder / f"{name}.csv", rows_of(name, seed))
        made[name] = run_of(folder, name, base, file, {"name": task}, method, columns.get(name))
    return made


def conversations(seed, count=29):
    chance = random.Random(seed)
    words = ["capital", "Norway", "fruits", "red", "quick", "brown", "fox", "dogs", "small", "sentence"]
    some = lambda count: " ".join(chance.choices(words, k=count))
    return [{"instruction": f"{some(chance.randrange(2, 9))} {i}", "output": some(3)} for i in range(count)]


def make_writers(folder):
    made = {}
    tokenizer = language_bases.llama_like()
    tokenizer.chat_template = TEMPLATE
    llama = language_bases.save(folder / "llama", "Llama", tokenizer)
    for seed, (name, method) in enumerate({"first": {"name": "lora", "r": 3}, "second": {"name": "ia3"}}.items()):
        file = folder / f"{name}.json"
        file.write_text(json.dumps(conversations(seed)))
        task = {"name": "causal_lm", "max_new_tokens": 13}
        made[name] = run_of(folder, name, llama, file, task, method, {"text": "instruction", "label": "output"})
    stories = [" ".join(row["instruction"] for row in conversations(seed, 5)) for seed in range(31)]
    file = write(folder / "running.csv", [{"text": text} for text in stories])
    task = {"name": "causal_lm", "max_new_tokens": 11}
    made["running"] = run_of(folder, "running", llama, file, task, {"name": "lora", "r": 2}, {"label": None})
    t5 = language_bases.save(folder / "t5", "T5")
    pairs = write(folder / "pairs.csv", [{"text": r["instruction"], "label": r["output"]} for r in conversations(5)])
    task = {"name": "seq2seq", "max_new_tokens": 9, "generate": False}
    made["source"] = run_of(folder, "source", t5, pairs, task, {"name": "lora", "r": 2})
    return made


@contextlib.contextmanager
def running(app):
    """The app behind a real server on a free port; gives its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
