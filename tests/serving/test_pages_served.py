"""Pages over HTTP: words with their boxes, alone and beside others, answered as `afina predict` answers them."""

from __future__ import annotations

import json
import random

import httpx
import pytest
from document_bases import SIZE, form, save_base
from serving_runs import run_of, running

from afina.errors import CheckpointError
from afina.serving.app import make_app
from afina.serving.limits import Limits
from afina.serving.models import load_models
from afina.training.trained import TrainedRun

NAME = "document_token_classification"


def pages(count, seed):
    chance, found = random.Random(seed), []
    for _ in range(count):
        words, boxes, tags = form(chance)
        found.append({"words": words, "boxes": boxes, "label": tags, "page_size": SIZE})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("documents")


def run_on(folder, kind, **task):
    base, file = save_base(folder / kind, kind), folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pages(29, 0)))
    columns = {"text": "words", "boxes": "boxes", "page_size": "page_size"}
    return run_of(folder, f"{kind} run", base, file, {"name": NAME, "boxes": "pixels", **task},
                  {"name": "lora", "r": 3, "target_modules": "all-linear"}, columns)  # fmt: skip


def test_pages_are_answered_as_predict_does(folder):
    made = run_on(folder, "layoutlm")
    trained, asked = TrainedRun.load(made), pages(5, 7)
    rows = [{"text": json.dumps(p["words"]), "boxes": json.dumps(p["boxes"]), "page_size": json.dumps(SIZE)} for p in asked]
    examples = trained.asked(rows)
    right = [trained.task.respond(a, e) for a, e in zip(trained.answers(examples), examples, strict=True)]
    limits = Limits(max_body=40_000, max_batch=7, timeout=60.0)
    with running(make_app(load_models({"pages": made}), limits)) as address:
        inputs = [{"text": p["words"], "boxes": p["boxes"], "page_size": p["page_size"]} for p in asked]
        said = httpx.post(f"{address}/classify", json={"model": "pages", "input": inputs}, timeout=60).json()
        for found, expected in zip(said["data"], right, strict=True):
            assert found["tags"] == expected["tags"]
            assert [e["box"] for e in found["entities"]] == [e["box"] for e in expected["entities"]]
        for wrong, told in (
            ({"text": ["a"], "boxes": [[0, 0, 999, 5]], "page_size": SIZE}, "outside the page of 203 x 307"),
            ({"text": ["a"]}, "no boxes"),
        ):
            answer = httpx.post(f"{address}/classify", json={"model": "pages", "input": [wrong]}, timeout=60)
            assert answer.status_code == 400
            assert told in answer.json()["error"]["message"]


def test_runs_that_look_at_pages_are_not_served(folder):
    made = run_on(folder, "layoutlmv3", pictures=False)
    path = made / "metrics.json"
    load_models({"words alone": made})
    metrics = json.loads(path.read_text())
    metrics["task"]["options"]["pictures"] = True
    path.write_text(json.dumps(metrics))
    with pytest.raises(CheckpointError, match=r"reads files.*afina predict.*task.pictures=false"):
        load_models({"pages": made})
