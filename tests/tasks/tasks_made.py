"""A task on a tiny base, without a file: rows by role in, training and answers out."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from tiny_bases import TELLING, WORDS

from afina import LoraConfig, get_peft_model
from afina.tasks.catalogue import find_task, task_from_settings
from afina.tasks.task import Rows
from afina.training.loop import fit, make_engine, predict
from afina.training.models import ModelSource, load_tokenizer
from afina.training.recipe import TrainingOptions

SIGNALS = [word for words in TELLING.values() for word in words]


def sentences(count, *, seed=0, signals=1):
    """Different texts, and which of the telling words each of them holds."""
    chance = random.Random(seed)
    texts = {}
    while len(texts) < count:
        inside = chance.sample(SIGNALS, chance.randrange(signals + 1) if signals > 1 else 1)
        words = [*chance.choices(WORDS, k=chance.randrange(2, 13)), *inside]
        chance.shuffle(words)
        texts[" ".join(words)] = sorted(inside)
    return list(texts.items())


def examples_of(name, rows):
    """Examples of rows by role."""
    kind = find_task(name).kind
    return [replace(kind.make(row, line), row=row) for line, row in enumerate(rows, 2)]


def made(name, base, rows, *, r=5, method=None, **options):
    """The task, an adapted model, and the rows, all of them encoded."""
    cls = find_task(name)
    examples = examples_of(name, rows)
    source = ModelSource(str(base), str(base), str(base))
    task = cls(load_tokenizer(source), cls.Options(**options), cls.learn(examples, []))
    torch.manual_seed(0)
    model = task.load_model(str(base))
    limit = task.limit(model)
    idle = task.idle(model) or None
    config = method or LoraConfig(r=r, target_modules="all-linear", exclude_modules=idle, task_type=task.task_type)
    return task, get_peft_model(model, config), Rows(examples, task.encode(examples, None, limit).features)


def trained(task, model, rows, folder, tell=lambda line: None, **options):
    """Train on the rows and validate on the same."""
    options = {"epochs": 20, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "weight_decay": 0.0, **options}
    engine = make_engine("fp32")
    return fit(model, task, rows, rows, TrainingOptions(**options), engine, folder, tell=tell)


def answered(task, model, rows):
    """One answer a row."""
    return predict(model, task, rows, 7, make_engine("fp32"), exact=True)


@torch.no_grad()
def asked(task, model, features):
    """The answers to one batch."""
    return task.answers(model.eval(), task.collate(features))


def reread(task, base):
    """The task again, from what a run keeps of it."""
    import json

    return task_from_settings(json.loads(json.dumps(task.settings())), load_tokenizer(ModelSource("", str(base), "")))


def gradient(name, base, rows, folder, count, **options):
    """The loss of one step over all rows in `count` parts, and its gradient: what plain descent at a rate of one moves."""
    task, model, encoded = made(name, base, rows, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    lines = []
    trained(
        task, model, encoded, folder, lines.append, optimizer="sgd", learning_rate=1.0, warmup=0.0, max_grad_norm=1e9,
        epochs=1, batch_size=len(rows), gradient_accumulation=count,
    )  # fmt: skip
    (loss,) = [line["loss"] for line in lines if "loss" in line]
    return loss, {n: p.detach() - before[n] for n, p in model.named_parameters() if p.requires_grad}


def check_parts_change_nothing(name, base, rows, folder, **options):
    """T25 for one task: 1, 2, 4 and 7 parts of a step give the same loss and gradient."""
    loss, moved = gradient(name, base, rows, folder / "1", 1, **options)
    assert loss > 0.01
    assert sum(bool(change.abs().max() > 1e-4) for change in moved.values()) > len(moved) / 3  # half of LoRA begins at rest
    for count in (2, 4, 7):
        other, changes = gradient(name, base, rows, folder / str(count), count, **options)
        assert abs(other - loss) < 1e-5 * loss, count
        for n, change in moved.items():
            torch.testing.assert_close(changes[n], change, rtol=1e-3, atol=1e-5)
