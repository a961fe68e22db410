"""The benchmarks of training run with a tiny base, measure what `afina train` does, and render what was measured."""

from __future__ import annotations

import json
import random
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import few_rows  # noqa: E402
import sms_spam  # noqa: E402
from classifier import adapted, full, prepared  # noqa: E402
from harness import between_markers  # noqa: E402
from tiny_bases import save_bert, write_rows  # noqa: E402

from afina.cli.main import main  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_bert(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    write_rows(path, 113, columns=("text", "label"))
    path.write_text(path.read_text().replace(",complaint", ",spam").replace(",other", ",ham"))
    return path


def test_a_row_of_the_table_is_what_the_command_line_trains(base: str, file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    row = adapted(prepared(file, 3, model=base, epochs=2))
    words = ["train", "--data", file, "--text", "text", "--label", "label", "--model", base, "--seed", 3, "--epochs", 2]
    monkeypatch.setattr(sys, "argv", ["afina", *map(str, words), "--output", str(tmp_path / "run")])
    with suppress(SystemExit), warnings.catch_warnings():
        main()
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert row["accuracy"] == pytest.approx(test["accuracy"], abs=1e-5)
    assert row["loss"] == pytest.approx(test["loss"], abs=1e-4)
    size = sum(p.stat().st_size for p in (tmp_path / "run" / "adapter").glob("*.safetensors"))
    assert row["stored_mib"] == pytest.approx(size / 2**20, abs=0.01)


def test_full_fine_tuning_trains_every_weight_of_the_same_base_on_the_same_steps(base: str, file: Path) -> None:
    run = prepared(file, 1, model=base, epochs=1)
    small, large = adapted(run), full(prepared(file, 1, model=base, epochs=1), 1e-3)
    assert large["trained"] == sum(p.numel() for p in run.task.load_model(base).parameters())
    assert (small["steps"], small["rows"]) == (large["steps"], large["rows"])
    assert small["trained"] < large["trained"]
    assert small["stored_mib"] < large["stored_mib"]


def test_a_small_draw_is_part_of_a_large_one_and_holds_so_many_of_each_class() -> None:
    chance = random.Random(5)
    rows = [(f"text {i}", chance.choice("aabc")) for i in range(211)]
    there = {label: sum(row[1] == label for row in rows) for label in "abc"}
    for small, large in ((3, 17), (17, 97)):
        draws = [few_rows.drawn(rows, size, seed=2) for size in (small, large)]
        assert set(draws[0]) <= set(draws[1])
        for size, draw in zip((small, large), draws, strict=True):
            assert len(set(draw)) == len(draw)
            assert all(sum(row[1] == label for row in draw) == min(size, count) for label, count in there.items())
    assert few_rows.drawn(rows, 3, seed=2) == few_rows.drawn(rows, 3, seed=2) != few_rows.drawn(rows, 3, seed=3)


def test_few_rows_measures_each_cell_once_and_renders_it(base: str, file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(few_rows.RATES, ("sms_spam", "full"), (5e-5, 2e-4))
    sides = {"sms_spam": few_rows.sides_of_sms(file, model=base)}
    path, results = tmp_path / "few.json", dict[str, Any]()
    results["about"] = few_rows.about(few_rows.PACKAGES, 1)
    small: dict[str, Any] = {"sizes": (5, 16), "model": base, "steps": 4}
    few_rows.measure(sides, ["lora", "full"], [0], path, results, **small)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["way"], row["a_class"]) for row in rows] == [(way, size) for way in ("lora", "full") for size in (5, 16)]
    assert all(row["train_rows"] <= 2 * row["a_class"] and row["rows"] == len(sides["sms_spam"]["test"]) for row in rows)
    assert len({row["steps"] for row in rows if row["a_class"] == 16}) == 1
    few_rows.measure(sides, ["lora"], [0], path, results, **small)
    assert json.loads(path.read_text())["rows"] == rows
    few_rows.measure(sides, ["full"], [0], path, results, choose=True, **{**small, "sizes": (16,)})
    assert [row["rate"] for row in results["chosen"]] == [5e-5, 2e-4]
    text = few_rows.render(results)
    assert all(f"{row['macro_f1']:.3f}" in text for row in rows if row["a_class"] == 16)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_sms_spam_measures_every_way_on_the_same_rows(base: str, file: Path, tmp_path: Path) -> None:
    results: dict[str, Any] = {"rows": [], "about": sms_spam.about(sms_spam.PACKAGES, 1)}
    saved: list[int] = []
    sms_spam.measure(
        file, list(sms_spam.WAYS), [4], results, lambda: saved.append(len(results["rows"])), model=base, epochs=2
    )
    assert saved == [1, 2, 3, 4]
    rows = {row["way"]: row for row in results["rows"]}
    assert rows.keys() == sms_spam.WAYS.keys()
    assert len({(row["rows"], row["train_rows"]) for row in rows.values()}) == 1
    assert rows["lora"]["trained"] == rows["peft_same"]["trained"]
    assert rows["lora"]["steps"] == rows["peft_same"]["steps"] == 2 * rows["peft_1"]["steps"]
    text = sms_spam.render(results)
    assert all(f"{row['accuracy']:.4f}" in text for row in rows.values())
    assert "met" in text


@pytest.mark.parametrize("script", ["sms_spam", "few_rows"])
def test_the_document_says_what_the_files_of_results_say(script: str) -> None:
    module = {"sms_spam": sms_spam, "few_rows": few_rows}[script]
    text = DOCUMENT.read_text(encoding="utf-8")
    results = json.loads(module.RESULTS.read_text(encoding="utf-8"))
    assert text == between_markers(text, script, module.render(results))
