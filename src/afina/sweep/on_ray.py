"""A sweep in parts on a Ray cluster: each part is `afina sweep ... --array K/N`, a process of its own.

The machines must see the same folders. A part that was lost is begun again and goes on where it stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from afina.errors import MissingDependencyError, TrainingError
from afina.report.words import counted

__all__ = ["train_on_ray"]

_LINES = 12  # of what a part that failed had said last


def train_on_ray(
    words: Sequence[str], address: str, parts: int | None, points: int, say: Callable[[str], Any],
    begin: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Run the command `words` in `parts` parts (None: one a GPU, else one a machine), and wait for all.

    `address`: of a cluster; `auto`: of the one this machine is in; `local`: one that is started here for as long. `begin` is
    called once there is one.
    Raises TrainingError with the last words of each part that failed, once all have ended.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("ray", "ray", "--ray") from error
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False
                 if address == "local" else None)  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise TrainingError(f"--ray {address}: no cluster could be reached ({str(error).splitlines()[0]})") from error
    try:
        begin()
        found = ray.cluster_resources()
        machines, gpus = len([n for n in ray.nodes() if n["Alive"]]), int(found.get("GPU", 0))
        count = min(points, parts or gpus or machines)
        cores = max(1, int(found.get("CPU", 1)) // count) if count >= machines else max(
            1, int(found.get("CPU", 1)) // machines)  # fmt: skip
        remote = ray.remote(num_cpus=cores, num_gpus=1 if gpus else 0, max_retries=2)(_part)
        say(f"Ray: {counted(count, 'part')} of {counted(points, 'point')}, {counted(cores, 'core')} each")
        folder = os.getcwd()
        waiting = {remote.remote([*words, "--array", f"{k}/{count}"], folder, cores): k for k in range(1, count + 1)}
        failed = []
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            part = waiting.pop(ready)
            try:
                code, said = ray.get(ready)
            except ray.exceptions.RayError as error:
                code, said = 1, str(error)
            say(f"  part {part} of {count} {'is finished' if code == 0 else f'ended with code {code}'}")
            if code:
                failed.append(f"part {part} ended with code {code}:\n{said}")
        if failed:
            raise TrainingError("\n".join([*failed, "What is finished stays; type the same with --resume to go on."]))
    finally:
        ray.shutdown()


def _part(words: Sequence[str], folder: str, cores: int) -> tuple[int, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    command = [sys.executable, "-m", "afina", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-_LINES:])
