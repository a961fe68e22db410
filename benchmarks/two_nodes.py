"""A run over two machines, rehearsed on one: two network namespaces with a cable between them.

    sudo python benchmarks/two_nodes.py [--engine fsdp2] [--markdown docs/distributed.md]

Each namespace has an address of its own and sees nothing but the other; in each torchrun starts one process, as on two
machines. The run is compared with one process; then it is begun again, the second machine is lost in the middle (its
processes are killed), and `--resume` goes on. Needs Linux, root and `ip`; where namespaces are not allowed it says so and
ends with code 77.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from engines import adapters_apart, losses_apart, rows_made_up, steps, without_dropout
from harness import about, parser_of, put_into, write_json

SKIPPED = 77
NAMES, ADDRESSES, PORT = ("afina-a", "afina-b"), ("10.77.0.1", "10.77.0.2"), 29512


def ip(*words: str) -> None:
    """Call `ip`; its error is raised."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_networks() -> Iterator[None]:
    """Two namespaces and a pair of interfaces, removed at the end."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        print("skipped: two_nodes needs Linux and the command ip")
        raise SystemExit(SKIPPED)
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "cable-a", "netns", NAMES[0], "type", "veth", "peer", "name", "cable-b", "netns", NAMES[1])
        for name, end, address in zip(NAMES, ("cable-a", "cable-b"), ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    except subprocess.CalledProcessError as error:
        print(f"skipped: network namespaces are not allowed here ({error.stderr.strip()})")
        raise SystemExit(SKIPPED) from None
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def started(node: int, words: list[str], said: Any) -> subprocess.Popen[bytes]:
    """torchrun on one of the two."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"cable-{'ab'[node]}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank",
                str(node), "--master-addr", ADDRESSES[0], "--master-port", str(PORT)]  # fmt: skip
    command = ["ip", "netns", "exec", NAMES[node], *launcher, "-m", "afina", "train", *words, "--quiet"]
    return subprocess.Popen(command, env=environment, stdout=said, stderr=said)


def both(words: list[str], folder: Path) -> list[int]:
    """Run on both to the end; their exit codes."""
    with (folder / "said.txt").open("w") as said:
        nodes = [started(node, words, said) for node in (0, 1)]
        codes = [node.wait() for node in nodes]
    if any(codes):
        raise SystemExit(f"the run ended with codes {codes}:\n{(folder / 'said.txt').read_text()[-3000:]}")
    return codes


def lost_in_the_middle(words: list[str], output: Path, step: int, folder: Path) -> tuple[float, int]:
    """Kill all processes of the second machine; seconds until the first has ended, and its code."""
    with (folder / "said.txt").open("w") as said:
        nodes = [started(node, words, said) for node in (0, 1)]
        while len(steps(output)) < step:
            if nodes[0].poll() is not None:
                raise SystemExit(f"the run ended before step {step}:\n{(folder / 'said.txt').read_text()[-3000:]}")
            time.sleep(0.02)
        second = psutil.Process(nodes[1].pid)
        for process in (*second.children(recursive=True), second):
            process.send_signal(signal.SIGKILL)
        lost = time.monotonic()
        code = nodes[0].wait()
        nodes[1].wait()
    return time.monotonic() - lost, code


def main() -> None:
    """Rehearse and write."""
    parser = parser_of(__doc__, renders=False)
    parser.add_argument("--engine", default="fsdp2")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "two_nodes.json")
    options = parser.parse_args()
    with two_networks(), tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data = rows_made_up(folder / "rows.csv", options.rows)
        recipe = ["--data", str(data), "--text", "message", "--label", "label", "--model",
                  without_dropout(options.model, folder / "model"), "--epochs", "2", "--precision", "fp32",
                  "--engine", options.engine, "training.checkpoint_every=5"]  # fmt: skip
        one, two, broken = (folder / name for name in ("one", "two", "broken"))
        subprocess.run([sys.executable, "-m", "afina", "train", *recipe, "--output", str(one), "--quiet"], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        both([*recipe, "--output", str(two)], folder)
        after, code = lost_in_the_middle([*recipe, "--output", str(broken)], broken, len(steps(one)) * 2 // 3, folder)
        if code == 0:
            raise SystemExit("the first machine ended as if nothing had happened")
        both(["--resume", "--output", str(broken)], folder)
        train = json.loads((two / "metrics.json").read_text(encoding="utf-8"))["train"]
        found = {
            "engine": train["engine"], "processes": train["processes"], "steps": train["steps"],
            "losses": losses_apart(two, one), "adapter": adapters_apart(two, one), "resumed": adapters_apart(broken, two),
            "seconds_to_end": after, "code": code,
        }  # fmt: skip
    machine = about(["torch", "transformers", "accelerate"], 1)
    write_json(options.json, {"about": machine, "two_nodes": found})
    text = (
        f"Rehearsed with `{found['engine']}` and {options.model} without dropout, {found['steps']} steps: losses differ "
        f"from one process by {found['losses']:.0e} at most (relative), the adapter by {found['adapter']:.0e}. After "
        f"the second machine "
        f"was lost, the first ended with an error within {found['seconds_to_end']:.0f} s; resumed on both, the adapter "
        f"differs from the unbroken one by {found['resumed']:.0e}. ({machine['cpu']}, torch {machine['versions']['torch']}, "
        f"{machine['date']})"
    )
    print(text)
    put_into(options.markdown, "nodes", text)


if __name__ == "__main__":
    main()
