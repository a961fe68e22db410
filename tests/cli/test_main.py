"""The command line as a whole: it starts at once, and says what is wrong without a traceback."""

from __future__ import annotations

import subprocess
import sys
import time

import afina as library

HEAVY = ("torch", "transformers", "numpy", "accelerate", "safetensors", "yaml")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['afina', '--help']\n"
        "from afina.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('LOADED', [m for m in {HEAVY} if m in sys.modules])"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    taken = time.perf_counter() - started
    assert "LOADED []" in done.stdout
    for command in ("train", "predict", "evaluate", "methods", "targets"):
        assert command in done.stdout
    assert taken < 1.5  # 0.2 s on an idle machine


def test_version(afina):
    assert afina("--version").out.strip() == f"afina {library.__version__}"


def test_problems_are_collected_and_named_as_typed(afina, places, tmp_path):
    said = afina(
        "train", "--data", places / "rows.csv", "--text", "mesage", "--label", "label", "--model", places / "bose",
        "--precision", "fp16", "--epochs", 0, "--batch-size", 2, "--gradient-accumulation", 3, "--output", places,
        "rr=1", "r=x",
    )  # fmt: skip
    assert said.code == 1
    assert said.out == ""
    for part in (
        "--text: ", "Did you mean 'message'", "no such folder. Did you mean 'base'", "--precision=fp16", "use ",
        "--epochs=0", "--gradient-accumulation=3", "is not empty", "'rr' is no option of lora. Did you mean 'r'",
        "r=x: expected a whole number",
    ):  # fmt: skip
        assert part in said.err, part


def test_missing_options_are_all_named(afina):
    said = afina("train")
    assert said.code == 1
    for option in ("--data", "--text", "--label", "--output"):
        assert f"{option} is missing" in said.err


def test_unknown_method(afina, places):
    said = afina("train", "--data", places / "rows.csv", "--text", "message", "--label", "label", "--method", "laro")
    assert "--method: method 'laro' is not known. Did you mean 'lora'" in said.err


def test_a_file_of_rows_without_its_option(afina, places):
    rows = places / "rows.csv"
    assert f"a file or folder of rows is given as data.file={rows}" in afina("train", rows, "--epochs", "3").err


def test_problems_within_a_problem_stand_below_it(afina):
    said = afina("train", "r=0", "lora_dropout=7").err
    assert "  - LoraConfig: 2 problems\n      - r=0: expected" in said


def test_a_choice_is_listed_once(afina):
    said = afina("train", "training.packing=yes").err
    assert "training.packing='yes': expected one of 'auto', 'on', 'off'.\n" in said


def test_output_that_cannot_be_made(afina, places, tmp_path):
    """Told before anything is loaded where that can be seen; by the system, in its words, elsewhere."""
    words = "--data", places / "rows.csv", "--text", "message", "--label", "label"
    below = places / "rows.csv" / "run"
    said = afina("train", *words, "--model", places / "base", "--output", below)
    assert (said.code, said.out) == (1, "")
    assert f"--output {below}: {places / 'rows.csv'} is a file; give a folder that can be made" in said.err
    said = afina("prepare", *words, "--output", below)
    assert said.code == 1
    assert f"{below}: Not a directory. Give a file or folder that is there" in said.err


def test_a_bug_is_one_line_too(afina, monkeypatch):
    monkeypatch.setattr("afina.core.registry.methods", lambda: 1 / 0)
    said = afina("methods")
    assert said.code == 1
    assert "ZeroDivisionError" in said.err
    assert "--debug" in said.err


def test_a_file_that_is_no_run(afina, tmp_path):
    assert "no run folder" in afina("predict", tmp_path / "none", "--text", "x").err
    assert "no finished run" in afina("predict", tmp_path, "--text", "x").err
    assert "nothing to answer" in afina("predict", tmp_path).err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "recipe.yaml").write_text("model: minilm\n")
    (tmp_path / "metrics.json").write_text("{")
    said = afina("predict", tmp_path, "--text", "x").err
    assert "metrics.json is broken (JSONDecodeError" in said
    assert "`afina train ... --resume` writes it again" in said
