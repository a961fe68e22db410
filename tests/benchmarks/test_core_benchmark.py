"""The benchmark runs from end to end, gives every section its numbers, and renders them; how fast anything is, is not
tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, DOCUMENT = ROOT / "benchmarks" / "core.py", ROOT / "docs" / "benchmarks.md"
SECTIONS = {"inject", "load", "overhead", "memory", "files", "round_trip", "import"}


def run(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "core.json"
    run("--quick", "--output", path)
    return path


@pytest.fixture(scope="module")
def results(file: Path) -> Any:
    return json.loads(file.read_text())


def test_every_section_has_rows_of_both_packages(results: Any) -> None:
    assert results["sections"].keys() == SECTIONS
    for name, rows in results["sections"].items():
        assert rows or name == "import", name
        for row in rows:
            assert row["case"]
            values = [v for v in row.values() if isinstance(v, dict)]
            assert values
            assert all({"ours", "theirs"} <= v.keys() for v in values)
            assert all(isinstance(n, int | float) for v in values for n in v.values())


def test_times_come_with_their_ratio_and_target(results: Any) -> None:
    for name in ("inject", "load"):
        for row in results["sections"][name]:
            ours, *theirs = row["cpu_ms"].values()
            assert row["cpu_ratio"] == pytest.approx(ours / min(theirs), rel=0.02, abs=1e-3)
            assert row["met"] == (row["cpu_ratio"] <= row["target"])


def test_what_does_not_depend_on_the_machine(results: Any) -> None:
    for row in results["sections"]["files"]:
        assert row["parameters"]["ours"] == row["parameters"]["theirs"] > 0
        assert row["file_bytes"]["ours"] == row["file_bytes"]["theirs"] > 0
    for row in results["sections"]["memory"]:
        assert 0 < row["bytes"]["ours"] <= row["bytes"]["theirs"], row["case"]


def test_machine_and_versions_stand_beside_the_numbers(results: Any) -> None:
    about = results["about"]
    assert {"date", "cpu", "cores", "threads", "python"} <= about.keys()
    assert {"afina", "peft", "torch", "transformers"} <= about["versions"].keys()


def test_the_tables_go_between_the_markers(file: Path, tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("before\n<!-- core:begin -->\nstale numbers\n<!-- core:end -->\nafter\n")
    run("--markdown", document, "--output", file)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale numbers" not in text
    assert "| LoRA, dropout 0.1, Linear 256 to 192" in text
    run("--markdown", document, "--output", file)
    assert document.read_text() == text
    document.write_text("no markers\n")
    assert "core:begin" in run("--markdown", document, "--output", file, code=1)


def test_a_quick_run_never_replaces_the_measured_numbers() -> None:
    assert "--output" in run("--quick", code=2)


def test_the_document_says_what_the_file_of_results_says(tmp_path: Path) -> None:
    copy = tmp_path / "benchmarks.md"
    copy.write_text(DOCUMENT.read_text())
    run("--markdown", copy)
    assert copy.read_text() == DOCUMENT.read_text()
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    run("--markdown", readme, "--short")
    assert readme.read_text() == (ROOT / "README.md").read_text()
