"""Prints the planned and the measured bytes of a step of training: `plan_worker.py FOLDER fp32|bf16`."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch

from afina.fast.attention import short_attention
from afina.memory.heap import large_tensors_apart
from afina.memory.measure import measured
from afina.memory.step import lean_step
from afina.training.optimizers import make_optimizer
from afina.training.plan import planner_for
from afina.training.recipe import MemoryOptions, Recipe, TrainingOptions

MOVING = ("activations", "logits", "workspace", "gradients", "allocator")


def main(folder: str, precision: str) -> None:
    recipe = Recipe(
        model=folder, training=TrainingOptions(max_length=127, batch_size=31, precision=precision),
        memory=MemoryOptions(limit="11GB"),
    )  # fmt: skip
    planner = planner_for(recipe, "cpu")
    plan = planner.plan(recipe)
    model, task = planner.adapted("fp32")
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
        for b in model.buffers():
            b.zero_()
    large_tensors_apart()  # as a run with a limit does
    lean_step(model, torch.device("cpu"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer("adamw", trained, 1e-3, 0.0)
    batch = task.collate(planner.features["train"][: recipe.training.rows])
    for _ in range(2):  # the first finds what is computed once
        with measured(torch.device("cpu")) as peak:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), \
                    short_attention() if precision == "bf16" else nullcontext():  # fmt: skip
                loss = task.loss_sum(model.train(), batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        del loss
    print(sum(plan.moments["train"].device.get(part, 0) for part in MOVING), peak.added)


if __name__ == "__main__":
    main(*sys.argv[1:])
