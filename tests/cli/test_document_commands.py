"""Scanned pages as a newcomer types it: a folder of forms, a model, an answer; and what is told where something is wrong."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from document_bases import save_base, write_funsd


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("cli")
    write_funsd(made / "forms", 17)
    for kind in ("layoutlm", "layoutlmv3"):
        save_base(made / kind, kind)
    return made


def words(folder, base, *more):
    return [
        "train", "--data", folder, "--task", "document_token_classification", "--model", folder.parent / base,
        "--epochs", "1", "--batch-size", "7", "--precision", "fp32", *more,
    ]  # fmt: skip


@pytest.fixture
def trained(folder, afina):
    """A run, made when it is first asked for, and what was said of it."""
    made, told = folder / "run", folder / "said.txt"
    if not told.is_file():
        said = afina(*words(folder / "forms", "layoutlmv3"), "--output", made, "task.boxes=pixels")
        assert said.code == 0, said.err
        told.write_text(said.out, encoding="utf-8")
    return made, told.read_text(encoding="utf-8")


def test_a_folder_of_forms_becomes_a_run(trained):
    folder, said = trained
    for part in ("34 words of the annotations are empty", "QUESTION", "IOB2", "entity F1", "--data FILE"):
        assert part in said, part
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 6  # the worst pages
    assert "boxes of words that are missed are blue" in page


def test_forms_are_answered_and_measured(trained, afina, tmp_path):
    run, _ = trained
    forms = run.parent / "forms"
    said = afina("predict", run, "--data", forms, "--output", tmp_path / "answered.csv")
    assert said.code == 0, said.err
    with (tmp_path / "answered.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 34
    assert all(len(row["answer_tags"].split()) == len(json.loads(row["words"])) for row in rows)
    said = afina("evaluate", run, "--data", forms)
    assert said.code == 0, said.err
    assert "entity F1" in said.out
    said = afina("predict", run, "--text", "some words")
    assert said.code != 0
    assert "reads boxes too; give rows by --data" in said.err


def test_what_is_wrong_is_told_together_with_the_cure(folder, afina, tmp_path):
    forms = folder / "forms"
    said = afina(*words(forms, "layoutlmv3"), "--output", tmp_path / "a")
    assert said.code != 0
    assert "task.boxes is missing: say pixels, or thousandths" in said.err
    said = afina(*words(forms, "layoutlmv3"), "--output", tmp_path / "a", "task.boxes=inches")
    assert "expected one of" in said.err or "pixels" in said.err
    said = afina(*words(forms, "layoutlmv3"), "--output", tmp_path / "a", "task.boxes=thousandths")
    assert "FUNSD's layout are pixels of the page; say task.boxes=pixels" in said.err
    broken = shutil.copytree(forms, tmp_path / "broken")
    shutil.copytree(folder / "layoutlm", tmp_path / "layoutlm")
    (broken / "training_data" / "images" / "3.png").unlink()
    (broken / "training_data" / "annotations" / "5.json").write_text('{"form": [{"words": 3}]}')
    said = afina(*words(broken, "layoutlm"), "--output", tmp_path / "a", "task.boxes=pixels")
    for part in ("annotations/3.json has no picture", "annotations/5.json: form[0] has no list"):
        assert part in said.err, part
    said = afina(*words(tmp_path, "layoutlm"), "--output", tmp_path / "a", "task.boxes=pixels")
    assert "expected annotations and images" in said.err


def test_pictures_that_are_missing_or_broken_and_boxes_beyond_the_page(folder, afina, tmp_path):
    shutil.copytree(folder / "layoutlmv3", tmp_path / "layoutlmv3")
    place = tmp_path / "rows"
    place.mkdir()
    image = folder / "forms" / "training_data" / "images" / "0.png"
    shutil.copy(image, place / "page.png")
    (place / "cut.png").write_bytes(image.read_bytes()[:200])
    row = {"words": ["a", "b"], "boxes": [[1, 2, 30, 40], [1, 2, 30, 40]], "labels": ["B-X", "O"], "image": "page.png"}

    def told(*rows, **options):
        file = place / "rows.jsonl"
        file.write_text("".join(json.dumps({**row, "words": [f"w{i}", "b"], **r}) + "\n" for i, r in enumerate(rows)))
        said = afina(*words(file, "../layoutlmv3"), "--output", tmp_path / "run", "task.boxes=pixels",
                     *(f"task.{k}={v}" for k, v in options.items()))  # fmt: skip
        assert said.code != 0
        return said.err

    said = told({"image": "gone.png"}, {"image": "cut.png"}, {})
    assert "line 1" in said
    assert "there is no such file" in said
    assert "line 2" in said
    assert "broken_files=true" in said
    said = told({"boxes": [[0, 0, 1, 1], [0, 0, 900, 5]]}, {"boxes": [[5, 0, 1, 1]] * 2}, {"boxes": [[0, 0, 1, 1]]}, {})
    for part in ("line 1: 1 box lies outside the page of 203 x 307 pixels", "line 2", "ends left of where it begins",
                 "line 3: 2 words and 1 boxes", "task.clip=true"):  # fmt: skip
        assert part in said, part
    said = told(*({"image": ""} for _ in range(9)))
    assert "nothing says how large the page is" in said


def test_the_example_of_receipts_says_what_it_would_do(folder, afina, tmp_path):
    recipe = Path(__file__).parents[2] / "examples" / "receipts.yaml"
    said = afina("train", recipe, "--model", folder / "layoutlmv3", "--output", tmp_path / "run", "--dry-run",
                 f"data.file={folder / 'forms'}")  # fmt: skip
    assert said.code == 0, said.err
    assert "Nothing was trained or written" in said.out


def test_a_plan_without_pages(folder, afina, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"task:\n  name: document_token_classification\n  boxes: pixels\nmodel: {folder / 'layoutlmv3'}\n"
        "training:\n  batch_size: 3\n  precision: fp32\n"
    )
    said = afina("plan", recipe)
    assert said.code == 0, said.err
    assert "as large as they come" in said.out + said.err
    said = afina("tasks", "document_token_classification")
    assert "thousandths" in said.out
