"""The benchmark of many adapters runs with tiny models and renders what it measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import adapters  # noqa: E402
from harness import about  # noqa: E402


@pytest.mark.filterwarnings("ignore")
def test_it_measures_and_renders(monkeypatch: Any) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(adapters.logging, "disable", lambda level: None)  # others read warnings of the log
    bench = adapters.Bench(quick=True)
    sections = {name: adapters.SECTIONS[name](bench) for name in ("mixed", "switch")}
    forward, training = sections["mixed"]
    assert forward["cpu_of_one"].keys() == {"ours", "theirs"}
    assert training["cpu_of_one"].keys() == {"ours"}
    assert [row["compiled"]["ours"] for row in sections["switch"]] == [0, 0]
    text = adapters.render({"about": about(adapters.PACKAGES, 1), "sections": sections})
    assert text.count("| MiniLM, bf16, 6 rows of 32 tokens") == 2
    assert "| hotswap_adapter |" in text


def test_the_document_has_its_place() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "<!-- adapters:begin -->" in text
