"""Speech as a newcomer types it: a list of recordings and transcripts, a model, a file that is written down."""

from __future__ import annotations

import csv
import json

import pytest
from sound_bases import save_wav2vec2_ctc, write_transcripts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("cli")
    write_transcripts(made / "rows", 29)
    save_wav2vec2_ctc(made / "base")
    return made


@pytest.fixture
def trained(folder, afina):
    """A run, made when it is first asked for, and what was said of it."""
    made, told = folder / "run", folder / "said.txt"
    if not told.is_file():
        said = afina(
            "train", "--data", folder / "rows", "--task", "speech_recognition", "--model", folder / "base", "--output", made,
            "--epochs", "9", "--batch-size", "7", "--learning-rate", "2e-2", "--precision", "fp32",
        )  # fmt: skip
        assert said.code == 0, said.err
        told.write_text(said.out, encoding="utf-8")
    return made, told.read_text(encoding="utf-8")


def test_a_list_of_recordings_becomes_a_run(trained):
    folder, said = trained
    for part in ("word error rate", "seconds", "brought from 8,000 to 4,000 Hz", "the commonest transcript", "--file FILE"):
        assert part in said, part
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "write down what is said" in page


def test_recordings_are_written_down(trained, afina, tmp_path):
    folder, _ = trained
    files = sorted((folder.parent / "rows").glob("1*.wav"))[:3]
    said = afina("predict", folder, *(w for f in files for w in ("--file", f)))
    assert said.code == 0, said.err
    assert all(str(f) in said.out for f in files)
    said = afina("predict", folder, "--data", folder.parent / "rows", "--output", tmp_path / "answered.csv")
    assert said.code == 0, said.err
    with (tmp_path / "answered.csv").open(encoding="utf-8", newline="") as file:
        answered = list(csv.DictReader(file))
    assert len(answered) == 29
    said = afina("predict", folder, "--file", files[0], "--json")
    of_file = {row["file_name"].rpartition("/")[2]: row["answer"] for row in answered}
    assert json.loads(said.out)["answer"] == of_file[files[0].name]
    said = afina("evaluate", folder, "--json")
    assert said.code == 0, said.err
    known = json.loads((folder / "metrics.json").read_text())["test"]
    assert json.loads(said.out)["wer"] == pytest.approx(known["wer"])


def test_memory_is_planned(trained, afina):
    folder, _ = trained
    found = []
    for rows in (2, 16):
        said = afina("plan", folder / "recipe.yaml", f"training.batch_size={rows}", "--json")
        assert said.code == 0, said.err
        found.append(json.loads(said.out)["moments"]["train"]["device"]["activations"])
    assert 2 * found[0] < found[1]
