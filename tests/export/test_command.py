"""`afina export` as it is typed: what it prints, what it refuses, and what it never does half."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import pytest
from runs_made import ANYTHING


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def export(capsys, monkeypatch):
    def run(*words):
        from afina.cli.main import main

        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["afina", "export", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return Said(code, said.out, " ".join(said.err.split()))

    return run


def test_an_export_is_told_and_verified(export, runs, tmp_path):
    run = runs("sequence_classification")
    said = export(run, "--format", "int8", "--output", tmp_path / "out", "--max-drop", ANYTHING)
    assert said.code == 0, said.err
    told = ("int8: ", "size", "speed", "times", "golden prompts", "validation rows", "accuracy", "afina export --verify")
    for part in told:
        assert part in said.out
    report = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert report["bytes"] < report["merged_bytes"]
    assert set(report["validation"]) >= {"rows", "macro_f1", "accuracy"}
    said = export("--verify", tmp_path / "out")
    assert said.code == 0, said.err
    assert "as they were written" in said.out
    said = export(run, "--format", "int8", "--output", tmp_path / "out")
    assert said.code == 1
    assert "exists and is not empty" in said.err
    said = export(run, "--format", "merged", "--output", tmp_path / "out", "--overwrite")
    assert said.code == 0, said.err
    assert not (tmp_path / "out" / "int8.json").exists()
    (tmp_path / "out" / "config.json").write_text("{}", encoding="utf-8")
    said = export("--verify", tmp_path / "out")
    assert said.code == 1
    assert "config.json is not the file that was written" in said.err


def test_what_is_wrong_is_told_together(export, tmp_path):
    said = export("--max-drop", "5", "--max-error", "-1")
    assert said.code == 1
    for part in ("--format is missing", "the run is missing", "--max-drop 5: expected a share", "--max-error -1: expected"):
        assert part in said.err
    said = export(tmp_path, "--format", "int8", "--verify", tmp_path)
    assert "--format and --verify exclude each other" in said.err
    assert f"leave {tmp_path} out" in said.err
    assert "expected vllm" in export(tmp_path, "--check", "tgi").err


def test_a_folder_of_something_else_is_never_replaced(export, runs, tmp_path):
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    said = export(runs("sequence_classification"), "--format", "merged", "--output", tmp_path, "--overwrite")
    assert said.code == 1
    assert "holds no export of afina" in said.err
    assert (tmp_path / "mine.txt").is_file()


def test_a_library_that_is_absent_is_named_with_the_command(export, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = export(runs("sequence_classification"), "--format", "onnx", "--output", tmp_path / "out")
    assert said.code == 1
    assert "pip install 'afina[onnx]'" in said.err
    assert not (tmp_path / "out").exists()
