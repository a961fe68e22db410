"""What is about to happen, shown before it does: by `afina train`, and alone by `afina check`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from afina.cli.show import heading, pairs, table
from afina.memory.sizes import shown_size
from afina.report.words import counted
from afina.training.batching import shuffled_batches

if TYPE_CHECKING:
    from afina.training.running import Run

__all__ = ["MOST_CLASSES", "show_plan"]

MOST_CLASSES = 8  # columns that fit on a screen
MOST_LETTERS = 3000  # of a text that is shown


def show_plan(run: Run) -> None:
    """What is about to happen, before it does."""
    recipe, model = run.recipe, run.model
    injected = model.adapters.injected["default"]
    trainable, total = model.get_nb_trainable_parameters()
    whole = f"{len(injected.saved)} trained whole" + (
        f" ({', '.join(injected.saved)})" if 0 < len(injected.saved) < 7 else ""
    )
    heading("Model")
    pairs(
        {
            "base": f"{recipe.model}, {type(model.get_base_model()).__name__}, {total:,} parameters",
            "method": " ".join(str(v) if k == "name" else f"{k}={v}" for k, v in short(recipe.method).items()),
            "layers": f"{len(injected.adapted)} adapted, {whole}, {frozen_layers(model)} frozen (see `afina targets`)",
            "trained": f"{trainable:,} parameters, {trainable / total:.2%} of all",
            **({"notes": "\n".join(run.notes)} if run.notes else {}),
        }
    )
    heading("Data")
    cleaned = run.divided.cleaned
    pairs(
        {
            "file": f"{recipe.data.file}: {cleaned.rows} rows, {cleaned.kept} used",
            "": "\n".join(run.divided.lines() or ["none dropped"]),
        }
    )
    labels = run.task.labels if run.task.kind.labels == "class" else []
    columns = labels if len(labels) <= MOST_CLASSES else []
    rows = [[name, len(side.examples), *(run.classes(name)[x] for x in columns)] for name, side in run.rows.items()]
    table(["rows", "all", *columns], rows, right=["all", *columns])
    if len(labels) > MOST_CLASSES:
        sizes = sorted(run.classes("train").values())
        pairs({"classes": f"{len(labels)}, of {sizes[0]} to {sizes[-1]} training rows"})
    lengths = sorted(run.encoded.lengths)
    cut = run.encoded.truncated
    known = {
        run.task.unit: f"{lengths[len(lengths) // 2]:,} a row in the middle, {lengths[-1]:,} at most"
        + (f"; {counted(cut, 'row')} cut off at {run.encoded.max_length}" if run.encoded.max_length else "")
    } if lengths[-1] > 1 else {}  # fmt: skip
    known |= {"": "\n".join(run.encoded.notes)} if run.encoded.notes else {}
    if known:
        pairs(known)
    example, tokens, aimed = run.example()
    heading(f"One training row as the model sees it (line {example.line})")
    parts = {run.columns[role]: _begin(example.row[role]) for role in run.columns}
    said = "tokens" if run.task.tokenizer is not None else "read as"
    pairs({**parts, f"{said}{' ' if said in parts else ''}": " ".join(tokens)})
    if any(aimed):
        pairs({"supervised": " ".join(token for token, target in zip(tokens, aimed, strict=True) if target)})
    elif example.label in labels:
        pairs({"class": f"{labels.index(example.label)}"})
    options = recipe.training
    budget = options.batch_tokens
    steps = len(shuffled_batches(run.rows["train"].lengths, options.rows, seed=options.seed, epoch=1, tokens=budget))
    steps *= run.task.repeats
    size = f"{options.batch_size} rows" if not budget else f"up to {budget} tokens"
    heading("Plan")
    pairs(
        {
            "epochs": f"{options.epochs} of {steps} steps, {size} a step{_parts(options)}",
            "learning rate": f"{options.learning_rate:g} at its peak",
            "precision": run.precision + (" (trained weights stay fp32)" if run.precision != "fp32" else ""),
            "base": f"frozen weights in {recipe.memory.weights}"
            + (", blocks computed again in backward" if recipe.memory.gradient_checkpointing else ""),
            "optimizer": f"{options.optimizer}, {options.schedule} schedule",
            **_memory(run),
            **_processes(recipe),
            "kept": f"the weights with the best {options.best} on the validation rows, read "
            f"{_every(options.evaluate_every, options.evaluate_unit)}"
            + (f"; ends after {options.patience} readings without a better one" if options.patience else ""),
            **({"output": run.output} if run.output.name else {}),
        }
    )


def _every(count: float, unit: str) -> str:
    """`every epoch`, `every 50 steps`."""
    return f"every {unit.removesuffix('s')}" if count == 1 else f"every {count:g} {unit}"


def _processes(recipe: Any) -> dict[str, str]:
    """How many share a step and how, where there is something to say."""
    count, asked = int(os.environ.get("WORLD_SIZE", "1")), recipe.distributed
    if count == 1 and asked.engine == "ddp":
        accelerate = any(key.startswith("ACCELERATE_") for key in os.environ)
        return {"processes": "1 is all that accelerate started (on a CPU: --multi_gpu)"} if accelerate else {}
    how = {
        "ddp": "a whole model in each",
        "fsdp2": "weights, gradients and optimizer in shards",
        "zero2": "a whole model in each, gradients and optimizer in shards",
        "zero3": "weights, gradients and optimizer in shards",
    }[asked.engine]
    where = ", in the host's memory" if asked.offload else ""
    rows = recipe.training.rows
    share = f"; of the {rows} rows of a step each computes {-(-rows // count)}" if count > 1 else ""
    if recipe.training.batch_tokens and count > 1:
        share = "; each computes its share of the rows of a step"
    return {"processes": f"{count}, {asked.engine}: {how}{where}{share}"}


def _memory(run: Run) -> dict[str, str]:
    """What the run was planned to take where there is a limit, and which settings were chosen for it."""
    if run.choice is None:
        return {}
    chosen = ", ".join(f"{key}={str(value).lower()}" for key, value in run.choice.changed.items())
    planned = f"{shown_size(run.choice.footprint.total)} of {shown_size(run.choice.limit)} planned"
    return {"memory": f"{planned}; for that {chosen}" if chosen else planned}


def _parts(options: Any) -> str:
    count = options.gradient_accumulation
    if count == "auto":
        return ", computed in as many parts as memory asks for (measured before the first step)"
    return f", computed in {count} parts" if count > 1 else ""


def _begin(text: str) -> str:
    """A text, or the begin of one that would fill the screen."""
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} ... and {len(text) - MOST_LETTERS:,} letters more"


def short(method: dict[str, Any]) -> dict[str, Any]:
    """The method's options that say something, without long lists."""
    said = {k: v for k, v in method.items() if v is not False and v != 0.0 and not (k == "init_lora_weights" and v is True)}
    return {k: (f"({len(v)} names)" if isinstance(v, list) and len(v) > 6 else v) for k, v in said.items() if v != "none"}


def frozen_layers(model: Any) -> int:
    """Modules with weights of their own that nothing trains."""
    adapters = model.adapters
    injected = adapters.injected["default"]
    touched = {key.split("#")[0] for key in injected.adapted} | set(injected.saved)
    weighty = [p for p, m in adapters.map.modules.items() if any(w is not None for w in m._parameters.values())]
    return sum(p not in touched and not any(p.startswith(f"{s}.") for s in injected.saved) for p in weighty)
