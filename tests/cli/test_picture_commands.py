"""Pictures as a newcomer types it: a folder, a model, an answer."""

from __future__ import annotations

import csv
import json

import pytest
from picture_bases import save_mobilenet, save_vit, write_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("cli")
    write_pictures(made / "rows", 17, sides=("train", "test"))
    save_vit(made / "vit")
    save_mobilenet(made / "mobilenet")
    return made


@pytest.fixture
def trained(folder, afina):
    """A run, made when it is first asked for, and what was said of it."""
    made, told = folder / "run", folder / "said.txt"
    if not told.is_file():
        said = afina(
            "train", "--data", folder / "rows", "--task", "image_classification", "--model", folder / "vit",
            "--output", made, "--epochs", "3", "--batch-size", "7", "--learning-rate", "5e-3", "--precision", "fp32",
        )  # fmt: skip
        assert said.code == 0, said.err
        told.write_text(said.out, encoding="utf-8")
    return made, told.read_text(encoding="utf-8")


def test_a_folder_becomes_a_run(trained):
    folder, said = trained
    for part in ("disc", "stripes", "16 x 16 pixels, 3 channels", "pictures/s", "--file FILE", "macro F1"):
        assert part in said, part
    assert "token" not in said.split("Training")[0]
    assert (folder / "report.html").is_file()


def test_pictures_are_answered(trained, afina):
    folder, _ = trained
    files = sorted((folder.parent / "rows" / "test").rglob("1*.png"))[:3]
    said = afina("predict", folder, *(w for f in files for w in ("--file", f)))
    assert said.code == 0, said.err
    assert all(str(f) in said.out for f in files)
    said = afina("predict", folder, "--file", files[0], "--json")
    answer = json.loads(said.out)
    assert answer["label"] in ("disc", "stripes")
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_a_folder_of_pictures_is_answered_and_measured(trained, afina, tmp_path):
    folder, _ = trained
    rows = folder.parent / "rows" / "test"
    said = afina("predict", folder, "--data", rows, "--output", tmp_path / "answered.csv")
    assert said.code == 0, said.err
    with (tmp_path / "answered.csv").open(encoding="utf-8", newline="") as file:
        answered = list(csv.DictReader(file))
    assert len(answered) == 34
    assert {row["answer"] for row in answered} <= {"disc", "stripes"}
    said = afina("evaluate", folder, "--data", rows, "--json")
    assert said.code == 0, said.err
    known = json.loads((folder / "metrics.json").read_text())["test"]
    assert json.loads(said.out)["accuracy"] == pytest.approx(known["accuracy"])
    said = afina("evaluate", folder, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["loss"] == pytest.approx(known["loss"], abs=1e-4)


def test_what_does_not_go_is_told(trained, folder, afina, tmp_path):
    made, _ = trained
    (tmp_path / "bad.png").write_text("no")
    for words, told in (
        (("predict", made, "--text", "apple"), "image_classification reads pictures; say --file FILE"),
        (("predict", made, "--file", tmp_path / "bad.png"), "bad.png: it is no picture that can be read"),
        (("predict", made, "--file", tmp_path / "none.png"), "none.png: there is no such file"),
        (("train", "--data", folder / "rows", "--task", "image_classification", "--model", folder / "vit", "--output",
          tmp_path / "run", "task.augment=crops"), "crop_and_flip"),
        (("train", "--data", folder / "rows", "--output", tmp_path / "run"), "say --task image_classification"),
        (("train", "--data", folder / "rows", "--task", "image_classification", "--model", folder / "vit", "--output",
          tmp_path / "run", "--max-length", "64"), "--max-length: image_classification reads no tokens"),
    ):  # fmt: skip
        said = afina(*words)
        assert said.code
        assert told in " ".join((said.out + said.err).split()), said.err


def test_a_plan_is_made_of_pictures(folder, afina, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: image_classification\nmodel: {folder / 'mobilenet'}\n")
    said = afina("plan", recipe, "--device", "cuda")
    assert said.code == 0, said.err
    assert "no data file was read" in said.out


def test_the_worst_mistakes_are_shown_as_pictures(trained, tmp_path):
    import shutil

    from afina.report.html import write_report

    folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "predictions.csv"
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    for row in rows[:3]:  # three answers turned round
        place = head.index("answer")
        row[place] = "disc" if row[place] == "stripes" else "stripes"
        row[place + 1] = "no" if row[place + 1] == "yes" else "yes"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    metrics["test"]["accuracy"] = sum(row[head.index("right")] == "yes" for row in rows) / len(rows)
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    wrong = [row[1] for row in rows if row[head.index("right")] == "no"]
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == len(wrong) > 0
    (tmp_path / "gone").mkdir()
    text = path.read_text(encoding="utf-8").replace(str(folder.parent / "rows"), str(tmp_path / "gone"))
    path.write_text(text, encoding="utf-8")
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "data:image/jpeg" not in page
    assert "the file is no longer there" in page
