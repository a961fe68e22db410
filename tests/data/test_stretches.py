"""Running text is divided where it stands."""

from __future__ import annotations

import pytest

from afina.data.read import read_table
from afina.data.stretches import stretched
from afina.errors import DataError
from afina.tasks.conversations import read_text


def table(path, text):
    path.write_text(text, encoding="utf-8")
    return read_table(path, read=read_text)


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"Paragraph {i} says\n{i * i} things.\n\n" for i in range(97)),
        "".join(f"line {i}\n" for i in range(211)),
        "word " * 503,
        "x" * 1009,
    ],
    ids=["paragraphs", "lines", "words", "one word"],
)
def test_parts_follow_each_other_and_are_the_text(tmp_path, text):
    read = table(tmp_path / "book.txt", text)
    assert (read.running, read.columns, len(read.rows)) == (True, ["text"], 1)
    made = stretched(read, validation=0.13, test=0.29)
    parts = [row["text"] for row in made.rows]
    assert "".join(parts) == text
    assert made.sides == ["train", "validation", "test"]
    assert not made.running
    assert [len(part) / len(text) for part in parts] == pytest.approx([0.58, 0.13, 0.29], abs=0.04)
    for part in parts[:-1]:
        if "\n\n" in text:
            assert part.endswith("\n\n")
        elif "\n" in text or " " in text:
            assert part[-1].isspace()
    whole = text.split("\n")
    assert all(part.startswith(whole[line - 1]) or len(whole) == 1 for line, part in zip(made.lines, parts, strict=True))
    assert f"test from line {made.lines[2]}" in made.notes[-1]


def test_a_text_that_is_too_short_or_empty_is_refused(tmp_path):
    with pytest.raises(DataError, match="too short to be divided"):
        stretched(table(tmp_path / "short.txt", "ab"), validation=0.1, test=0.2)
    with pytest.raises(DataError, match="is empty"):
        table(tmp_path / "empty.txt", " \n ")


def test_other_files_are_read_as_they_were(tmp_path):
    (tmp_path / "rows.csv").write_text("text\na\nb\n", encoding="utf-8")
    assert read_text(tmp_path / "rows.csv") is None
    assert not read_table(tmp_path / "rows.csv", read=read_text).running
