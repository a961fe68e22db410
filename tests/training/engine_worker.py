"""Runs that several processes share, one after the other: each is forked from this process, which has imported everything.

A folder holds one folder a run with `job.json`: engine, offload, processes, the step to die at, resume, and how the recipe
differs. Each process of a run leaves what it found in `process-N.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import deepspeed  # noqa: F401 (imported once for all)
import torch
import torch._dynamo  # optimizers import it late
import torch.distributed.fsdp

from afina.cli.show import quiet
from afina.training import loop
from afina.training.recipe import read_recipe
from afina.training.run import prepare

LONGEST = 90.0  # seconds of a run
torch.set_num_threads(1)


def work(folder: Path, job: dict) -> None:
    """One process of one run."""
    quiet()
    recipe = read_recipe(folder / job["recipe"])
    recipe.distributed.engine, recipe.distributed.offload = job["engine"], job.get("offload", False)
    for place, value in job.get("options", {}).items():
        section, key = place.split(".")
        setattr(getattr(recipe, section), key, value)
    found: dict = {"losses": []}
    rank = int(os.environ.get("RANK", "0"))

    def tell(line: dict) -> None:
        if "loss" in line:
            found["losses"].append(line["loss"])
            if line["step"] == job.get("die_at"):
                os.kill(os.getpid(), signal.SIGKILL)

    if job.get("broken_rank") == rank:
        steps = iter(range(3))
        monkeyed = loop._gradients

        def broken(*arguments):
            if next(steps, None) is None:
                raise ValueError("something broke")
            return monkeyed(*arguments)

        loop._gradients = broken
    started = time.monotonic()
    try:
        run = prepare(recipe, folder / job["output"], resume=job.get("resume", False), overwrite=True)
        found |= {"metrics": run.execute(tell)}
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
        found["where"] = traceback.format_exc()  # for the one who looks why
    found |= {"seconds": time.monotonic() - started}
    (folder / f"process-{rank}.json").write_text(json.dumps(found, default=str), encoding="utf-8")


def fork(folder: Path, job: dict) -> None:
    """All processes of a run; returns when they have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if "copy" in job:
        shutil.copytree(folder / job["copy"], folder / job["output"])
    children = []
    count = job.get("processes", 2)
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if count > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                           "LOCAL_WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
                           "TORCHELASTIC_RESTART_COUNT": str(port)}  # fmt: skip
        work(folder, job)
        sys.stdout.flush()
        os._exit(0)
    latest = time.monotonic() + LONGEST
    while children and time.monotonic() < latest:
        children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
        time.sleep(0.02)
    for child in children:  # a run that hangs is one without results
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    quiet()
    for name in sorted(Path(sys.argv[1]).glob("*.yaml")):  # which imports what each of them would import late
        prepare(read_recipe(name), None, trial=True)
    for place in sorted(Path(sys.argv[1]).glob("*/job.json")):
        fork(place.parent, json.loads(place.read_text(encoding="utf-8")))
