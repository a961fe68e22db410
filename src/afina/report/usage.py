"""How to load and use the adapter: lines to copy into a terminal or a Python file."""

from __future__ import annotations

import shlex
from pathlib import Path

from afina.report.folder import RunFolder
from afina.report.markup import Markup, el

__all__ = ["command_lines", "python_lines", "usage"]


def command_lines(folder: Path) -> str:
    """What to type in a terminal."""
    name = shlex.quote(str(folder))
    return "\n".join(
        [
            f'afina predict {name} --text "..."',
            f"afina predict {name} --data new.csv --output answered.csv",
            f"afina evaluate {name} --data labelled.csv",
            f"afina report {name}",
        ]
    )


def python_lines(run: RunFolder) -> str:
    """The adapter on its base, with transformers."""
    base = run.adapter.get("base_model_name_or_path") or run.recipe["model"]
    folder = str(run.path / "adapter")
    return f"""import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from afina import PeftModel  # or from peft, where it has the method

base = AutoModelForSequenceClassification.from_pretrained({str(base)!r}, num_labels={len(run.labels)})
model = PeftModel.from_pretrained(base, {folder!r}).eval()
tokenizer = AutoTokenizer.from_pretrained({folder!r})

batch = tokenizer(["..."], return_tensors="pt", truncation=True, max_length={run.recipe["training"].get("max_length")})
with torch.no_grad():
    print(torch.softmax(model(**batch).logits, -1))  # classes in the order of metrics.json: ["test"]["labels"]"""


def usage(run: RunFolder) -> Markup:
    """Both, to be selected with one click each."""
    return el(
        "div",
        el("h3", "In a terminal"),
        el("pre", el("code", command_lines(run.path)), tabindex="0"),
        el("h3", "In Python"),
        el("pre", el("code", python_lines(run)), tabindex="0"),
        el(
            "p",
            "To repeat the run: ",
            el("code", f"afina train {shlex.quote(str(run.path / 'recipe.yaml'))} --output ANOTHER"),
        ),
    )
