"""The server under load: many clients, several adapters mixed, every answer compared with the one that is right.

    python benchmarks/serving.py --markdown docs/serving.md

The server is `afina serve` in a process of its own; the clients are this one. What is right is said beforehand by the same
runs asked alone, one text at a time (`afina predict`). Three classifiers on MiniLM and, where the folder of data is there,
three writers on a small Llama. Nothing is retried: a request that is not answered counts as lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from harness import about, parser_of, put_into, read_json, table, write_json

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LLAMA = DATA / "models" / "stories260K-llama"
_SENTENCE = "please could you tell me when my order of two large lamps will arrive at the shop near our house today"
WORDS = _SENTENCE.split()
TOLERANCE = 1e-5  # of probabilities


@dataclass
class Load:
    """What one load showed."""

    name: str
    requests: int
    clients: int
    seconds: list[float] = field(default_factory=list)  # of each request
    wall: float = 0.0
    cpu: float = 0.0  # seconds of the server's process
    wrong: int = 0
    lost: int = 0
    resident: list[tuple[int, float]] = field(default_factory=list)  # requests answered, MiB
    rows: float = 0.0  # of a forward pass, in the mean
    mixed: float = 0.0  # share of passes with several adapters

    def row(self) -> dict[str, Any]:
        """As it goes into the table."""
        ordered = sorted(self.seconds)
        half = self.resident[len(self.resident) // 2 :]
        return {
            "load": self.name, "clients": self.clients, "requests": self.requests, "wrong": self.wrong, "lost": self.lost,
            "a second": round(self.requests / self.wall, 1), "a CPU second": round(self.requests / self.cpu, 1),
            "median ms": round(1000 * statistics.median(ordered)),
            "p99 ms": round(1000 * ordered[int(0.99 * len(ordered))]), "rows a pass": round(self.rows, 1),
            "mixed passes": f"{self.mixed:.0%}", "MiB after a tenth": round(self.resident[1][1]),
            "MiB at the end": round(self.resident[-1][1]), "KiB a request, second half": round(slope(half), 2),
        }  # fmt: skip


def slope(points: Sequence[tuple[int, float]]) -> float:
    """KiB a request, by least squares."""
    mean_x, mean_y = (statistics.fmean(p[i] for p in points) for i in (0, 1))
    below = sum((x - mean_x) ** 2 for x, _ in points)
    return 1024 * sum((x - mean_x) * (y - mean_y) for x, y in points) / below if below else 0.0


# --- runs


def sentences(count: int, seed: int) -> list[str]:
    """Different texts of 3 to 25 words."""
    chance = random.Random(seed)
    made = dict.fromkeys(" ".join(chance.choices(WORDS, k=chance.randrange(3, 26))) for _ in range(2 * count))
    return list(made)[:count]


def train(folder: Path, name: str, rows: list[dict[str, Any]], model: str, task: dict[str, Any], **training: Any) -> Path:
    """A run of a few seconds on rows with text and label."""
    from afina.training.recipe import DataOptions, Recipe, TrainingOptions
    from afina.training.run import prepare

    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    options = {"epochs": 2, "max_truncated": 1.0, "learning_rate": 3e-3, **training}
    recipe = Recipe(
        model=model, task=task, data=DataOptions(file=str(file), text="text", label="label"),
        method={"name": "lora", "r": 8}, training=TrainingOptions(**options),
    )  # fmt: skip
    prepare(recipe, folder / name).execute()
    return folder / name


def classifiers(folder: Path, model: str) -> dict[str, Path]:
    """Three, of two, four and one outputs."""
    texts = sentences(160, 1)
    aims = {
        "two": ("sequence_classification", lambda t: "orders" if "order" in t else "other"),
        "four": ("sequence_classification", lambda t: f"words {min(len(t.split()) // 7, 3)}"),
        "length": ("regression", lambda t: len(t.split())),
    }
    return {
        name: train(folder, name, [{"text": t, "label": aim(t)} for t in texts], model, {"name": task})
        for name, (task, aim) in aims.items()
    }


def writers(folder: Path) -> dict[str, Path]:
    """Three that answer instructions in their own way."""
    made, texts, task = {}, sentences(90, 2), {"name": "causal_lm", "max_new_tokens": 24}
    for i, name in enumerate(("first", "last", "upper")):
        answer = [lambda t: t.split()[0], lambda t: " ".join(t.split()[-3:]), lambda t: t.upper()[:20]][i]
        rows = [{"text": t, "label": answer(t)} for t in texts]
        made[name] = train(folder, name, rows, str(LLAMA), task, learning_rate=1e-2)
    return made


def expected(runs: dict[str, Path], texts: list[str]) -> dict[tuple[str, str], Any]:
    """What each run says to each text, asked alone and one text at a time."""
    from afina.training.trained import TrainedRun

    right = {}
    for name, folder in runs.items():
        run = TrainedRun.load(folder)
        for example in run.asked([{"text": text} for text in texts]):
            (answer,) = run.answers([example], batch_size=1)
            right[name, example.row["text"]] = run.task.respond(answer, example)
    return right


# --- server and clients


@contextlib.contextmanager
def server(runs: dict[str, Path], threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """`afina serve` in a process of its own: its address, and the process."""
    command = [sys.executable, "-m", "afina", "serve", *(f"{name}={folder}" for name, folder in runs.items()),
               "--port", "0", "--threads", str(threads), "--timeout", "600"]  # fmt: skip
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=settings)
    assert started.stdout is not None
    try:
        for line in started.stdout:
            if found := re.search(r"http://[\d.:]+", line):
                yield found[0], psutil.Process(started.pid)
                break
        else:
            raise RuntimeError("the server did not start")
    finally:
        started.terminate()
        started.wait(60)


def is_right(found: Any, right: dict[str, Any]) -> bool:
    """Texts equal, numbers near."""
    if isinstance(right, dict):
        return isinstance(found, dict) and all(key in found and is_right(found[key], value) for key, value in right.items())
    if isinstance(right, float):
        return abs(found - right) <= TOLERANCE * max(1.0, abs(right))
    return bool(found == right)


class Client:
    """One connection that asks again and again. Plain streams: the libraries for it take as much of a core as the server."""

    def __init__(self, address: str):
        self.host, port = address.removeprefix("http://").split(":")
        self.port = int(port)
        self.streams: Any = None

    async def post(self, path: str, body: Any) -> Any:
        """The answer's JSON. Raises OSError or ValueError where there is none."""
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self.streams
        content = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", f"Host: {self.host}", "Content-Type: application/json",
                 f"Content-Length: {len(content)}", "", ""]  # fmt: skip
        writer.write("\r\n".join(lines).encode() + content)
        told = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        answer = await reader.readexactly(int(re.search(r"content-length: (\d+)", told)[1]))  # type: ignore[index]
        if " 200 " not in told.splitlines()[0]:
            raise ValueError(answer.decode())
        return json.loads(answer)

    async def ask(self, name: str, text: str, chat: bool) -> Any:
        """One request, and what of its answer is compared."""
        if chat:
            body = {"model": name, "messages": [{"role": "user", "content": text}]}
            said = await self.post("/v1/chat/completions", body)
            return {"answer": said["choices"][0]["message"]["content"]}
        return (await self.post("/classify", {"model": name, "input": text}))["data"][0]


async def load(address: str, process: psutil.Process, right: dict[tuple[str, str], Any], made: Load, chat: bool) -> Load:
    """All clients ask, each again as soon as it is answered, until all requests are made."""
    requests, clients, chance = made.requests, made.clients, random.Random(3)
    waiting = iter(range(requests))
    asked = [chance.choice(list(right)) for _ in range(requests)]

    async def one() -> None:
        client = Client(address)
        for number in waiting:
            began = time.perf_counter()
            try:
                found = await client.ask(*asked[number], chat)
            except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
                made.lost += 1
                print(f"lost: {error!r}", file=sys.stderr)
                client.streams = None
                continue
            made.seconds.append(time.perf_counter() - began)
            made.wrong += not is_right(found, right[asked[number]])
            if len(made.seconds) % max(1, requests // 40) == 0:
                made.resident.append((len(made.seconds), process.memory_info().rss / 2**20))
                print(f"{made.name}: {len(made.seconds)} answered, {made.wrong} wrong, {made.lost} lost", file=sys.stderr)

    before = counters(address)
    made.resident.append((0, process.memory_info().rss / 2**20))
    cpu = sum(process.cpu_times()[:2])
    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    made.wall = time.perf_counter() - began
    made.cpu = sum(process.cpu_times()[:2]) - cpu
    after = counters(address)
    passes = after["afina_batch_rows_count"] - before["afina_batch_rows_count"]
    alone = after['afina_batch_adapters_bucket{le="1.0"}'] - before['afina_batch_adapters_bucket{le="1.0"}']
    made.rows = (after["afina_batch_rows_sum"] - before["afina_batch_rows_sum"]) / passes
    made.mixed = 1 - alone / passes
    made.resident = [made.resident[0], *made.resident[len(made.resident) // 10 :]]
    return made


def counters(address: str) -> dict[str, float]:
    """What the server has counted."""
    lines = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and line[0] != "#"}


def measured(args: argparse.Namespace, folder: Path) -> list[Load]:
    """The loads, one after the other."""
    found = []
    for name in args.loads:
        chat = name == "chat"
        if chat and not LLAMA.is_dir():
            print("without chat: ../shared/data/models/stories260K-llama is absent", file=sys.stderr)
            continue
        runs = writers(folder) if chat else classifiers(folder, args.model)
        right = expected(runs, sentences(args.texts, 7))
        with server(runs, args.threads) as (address, process):
            made = Load(name, args.chats if chat else args.requests, args.clients)
            found.append(asyncio.run(load(address, process, right, made, chat)))
        print(json.dumps(found[-1].row()))
    return found


def main() -> None:
    """Measure, print, write."""
    parser = parser_of(__doc__.splitlines()[0], renders=False)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--chats", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--texts", type=int, default=100, help="different texts asked of each adapter")
    parser.add_argument("--threads", type=int, default=1, help="threads of the server")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--loads", nargs="+", choices=("classify", "chat"), default=["classify", "chat"])
    parser.add_argument("--json", type=Path, help="file to write the figures into")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(args, Path(folder))
    rows = [one.row() for one in found]
    if args.json and args.json.is_file():  # loads that are not measured now stay as they were
        rows += [row for row in read_json(args.json)["loads"] if row["load"] not in args.loads]
    rows.sort(key=lambda row: str(row["load"]), reverse=True)
    shown = table(list(rows[0]), [list(row.values()) for row in rows])
    where = about(("torch", "transformers", "fastapi", "uvicorn"), args.threads)
    print(shown)
    if args.json:
        write_json(args.json, {"about": where, "loads": rows})
    if args.markdown:
        versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
        machine = f"{where['cpu']}, {args.threads} thread of {where['cores']} cores for the server, which the clients share"
        text = f"{shown}\n\n{where['date']}: {machine}; Python {where['python']}, {versions}."
        put_into(args.markdown, "serving", text)


if __name__ == "__main__":
    main()
