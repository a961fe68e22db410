"""Pictures and recordings where the task reads texts: the task that reads them is named."""

from __future__ import annotations

import pytest

from afina.cli.assignments import typed_as
from afina.data.options import DataOptions
from afina.errors import DataError
from afina.tasks.catalogue import find_task
from afina.tasks.other_files import rows_of

TEXTS = find_task("sequence_classification").kind


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"never read")
    return folder


def refused(file, kind=TEXTS, spell=str, **options):
    with pytest.raises(DataError) as told:
        rows_of(DataOptions(file=str(file), **options), kind, spell)
    return str(told.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/apple/1.PNG", "test/kiwi/7.png"], "It holds pictures ({}); for those say task.name=image_classification"),
        (["one/1.flac", "two/7.flac"], "It holds recordings ({}); for those say task.name=audio_classification"),
    ],
)
def test_a_folder_of_other_files_is_named(names, said, tmp_path):
    write(tmp_path, *names)
    told = refused(tmp_path)
    assert any(told.endswith(said.format(name)) for name in names)
    assert told.startswith(f"{tmp_path} is a folder that holds ")  # and what a folder of texts is


def test_a_folder_with_a_list_may_be_for_several_tasks(tmp_path):
    write(tmp_path, "1.wav", "metadata.csv")
    told = refused(tmp_path, spell=typed_as)
    assert told.endswith("(1.wav); for those say --task audio_classification or --task speech_recognition")


def test_pictures_for_a_task_of_recordings(tmp_path):
    told = refused(write(tmp_path, "a/1.jpg"), find_task("audio_classification").kind)
    assert told.endswith("It holds pictures (a/1.jpg); for those say task.name=image_classification")


def test_what_a_task_reads_itself_is_no_hint(tmp_path):
    told = refused(write(tmp_path, "train/1.png"), find_task("image_classification").kind)
    assert "expected every picture at" in told
    assert "It holds" not in told


def test_other_folders_are_refused_as_they_were(tmp_path):
    assert refused(write(tmp_path, "a/1.xyz")).endswith("a subfolder of .txt files for each class")
    assert "there is no file" in refused(tmp_path / "nothing.csv")


@pytest.mark.parametrize("named", [{}, {"text": "picture"}])
def test_a_column_of_paths_is_not_read_as_text(named, tmp_path):
    write(tmp_path, "1.png", "below/2.jpeg")
    (tmp_path / "rows.csv").write_text("picture,label\n1.png,a\nbelow/2.jpeg,b\n")
    told = refused(tmp_path / "rows.csv", **named)
    assert "the column 'picture' holds paths of pictures (1.png), which would be read as letters" in told
    assert "task.name=image_classification" in told
    rows = rows_of(DataOptions(file=str(tmp_path / "rows.csv"), image="picture"), find_task("image_classification").kind)
    assert rows.rows.column("picture") == [str(tmp_path / "1.png"), str(tmp_path / "below/2.jpeg")]


def test_names_without_files_and_texts_beside_files_are_texts(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nsee 1.png,a\n2.jpeg,b\n")
    write(tmp_path, "2.jpeg")
    assert len(rows_of(DataOptions(file=str(tmp_path / "rows.csv")), TEXTS).rows) == 2
    write(tmp_path, "see 1.png")
    assert "'text' holds paths of pictures" in refused(tmp_path / "rows.csv")
