"""Run folders of a classifier made without training: every file a report reads, from random answers."""

from __future__ import annotations

import csv
import json

import numpy as np
import yaml

from afina.report.statistics import histogram
from afina.tasks.metrics import classification_metrics

FIGURES = {"macro_f1": {"title": "macro F1", "form": ".3f", "better": 1, "final": False},
           "accuracy": {"title": "accuracy", "form": ".1%", "better": 1},
           "loss": {"title": "loss", "better": -1}}  # fmt: skip


def made_run(folder, *, labels=("complaint", "other"), rows=47, texts=None, columns=("message", "label"), seed=0, skill=2.0):
    """A finished run; `skill` is how far the right class stands out."""
    chance = np.random.default_rng(seed)
    labels, n = list(labels), len(labels)
    truth = np.arange(rows) % n
    scores = chance.normal(size=(rows, n))
    scores[np.arange(rows), truth] += skill
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    texts = [texts[i % len(texts)] if texts else f"row {i} of the test" for i in range(rows)]
    (folder / "data").mkdir(parents=True)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 1234)
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    )
    test = classification_metrics(p, truth, labels)
    base = classification_metrics(np.tile(np.eye(n)[0], (rows, 1)), truth, labels)
    train = {"seconds": 61.5, "best_epoch": 2, "trainable_parameters": 97, "total_parameters": 1009, "steps": 6,
             "tokens": 500,
             "tokens_per_second": 8.1, "peak_memory_bytes": 3 << 30, "precision": "fp32", "threads": 1}  # fmt: skip
    task = {"name": "sequence_classification", "options": {"calibrate": False}, "labels": labels}
    metrics = {"task": task, "figures": FIGURES, "test": test, "validation": test,
               "baselines": {"majority": {"title": "always the commonest class", **base}},
               "train": train, "versions": {"python": "3.11", "afina": "0"}}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    recipe = {"model": "minilm", "data": {"file": "rows.csv", "text": columns[0], "label": columns[1]},
              "method": {"name": "lora", "r": 3},
              "training": {"epochs": 3, "max_length": 61, "best": "macro_f1"}}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    counts = {label: int((truth == i).sum()) for i, label in enumerate(labels)}
    report = {"file": "rows.csv", "columns": {"text": columns[0], "label": columns[1]}, "rows": rows + 2, "kept": rows,
              "classes": counts, "duplicates": [5, 7], "truncated": 1, "max_length": 61,
              "tokens": {"0 %": 2, "50 %": 17, "100 %": 61}, "token_histogram": histogram([2, 17, 17, 61]),
              "splits": {s: {"rows": rows, "classes": counts} for s in ("train", "validation", "test")}}  # fmt: skip
    (folder / "data" / "data_report.json").write_text(json.dumps(report), encoding="utf-8")
    lines = []
    for step in range(1, 7):
        lines.append({"epoch": (step + 1) // 2, "step": step, "of": 6, "loss": 1 / step, "learning_rate": 1e-3 / step})
        if step % 2 == 0:
            lines.append({"epoch": step // 2, "step": step, "train_loss": 1 / step, "best": True, "seconds": 1.0,
                          "validation_loss": 0.5, "validation_accuracy": 0.7, "validation_macro_f1": 0.6})  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["line", *columns, "answer", "right", *(f"p({label})" for label in labels)])
        for i, row in enumerate(p):
            said = int(row.argmax())
            right = "yes" if said == truth[i] else "no"
            writer.writerow([i + 2, texts[i], labels[truth[i]], labels[said], right, *(f"{x:.6f}" for x in row)])
    return folder
