"""T41, T42: CSV files as people have them."""

from __future__ import annotations

import gzip
import random

import pytest

from afina.data.table import Form, read_csv
from afina.errors import DataError


def written(tmp_path, content, encoding="utf-8"):
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_t41_delimiter_mark_and_line_ends_are_found(tmp_path, delimiter, encoding, ending):
    header = delimiter.join([" text ", "label  ", "n"])
    rows = [delimiter.join([f'"One, two; three | four\t{i}é"', "yes", str(i)]) for i in range(7)]
    table = read_csv(written(tmp_path, ending.join([header, *rows]), encoding))
    assert table.columns == ["text", "label", "n"]
    assert table.delimiter == delimiter
    assert [row["text"] for row in table.rows] == [f"One, two; three | four\t{i}é" for i in range(7)]
    assert table.lines == list(range(2, 9))


def test_t41_quoted_line_breaks_keep_the_line_numbers(tmp_path):
    table = read_csv(written(tmp_path, 'text,label\n"a\nb\n\nc",x\n\n"say ""no""",y\n'))
    assert table.rows == [{"text": "a\nb\n\nc", "label": "x"}, {"text": 'say "no"', "label": "y"}]
    assert table.lines == [2, 7]


def test_wanted_columns_decide_between_delimiters(tmp_path):
    path = written(tmp_path, "a;b,c;d\n1;2,3;4\n")
    assert read_csv(path, {"b,c"}).columns == ["a", "b,c", "d"]
    assert read_csv(path, {"c;d"}).columns == ["a;b", "c;d"]


def test_what_is_written_is_read_back(tmp_path):
    """Any fields at all survive a round trip through Python's writer."""
    import csv

    chance = random.Random(7)
    letters = 'ab ,;|\t"\n\r é'
    fields = [["".join(chance.choices(letters, k=chance.randrange(1, 13))) + "." for _ in range(3)] for _ in range(53)]
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "z"])
        writer.writerows(fields)
    assert [list(row.values()) for row in read_csv(path, {"x", "y", "z"}).rows] == fields


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf  \n", "is empty"),
        (b"text,label\n", "no rows"),
        ("text,label\nfüß,x\n".encode() + b"na\xefve,y\n", "line 3, byte 3 is 0xef"),
        (b"text,label\na\0b,x\n", "line 2 holds a zero byte"),
        (b"PK\x03\x04rest", "spreadsheet"),
        (b"text,label\none,two,three\nx\n", "line 2 has 3 fields, the header has 2"),
        (b"text,label\nok,x\nonly\n", "line 3 has 1 field"),
        (b'text,label\nok,x\n"open,y\nmore,z\n', "begins in line 3 is never closed"),
        (b'text,label\n"a"b,y\n', "line 2"),
        (b"text,label,text\na,b,c\n", "names column 'text' 2 times"),
    ],
)
def test_t41_what_cannot_be_read_is_named_with_its_line(tmp_path, content, said):
    with pytest.raises(DataError) as error:
        read_csv(written(tmp_path, content))
    assert said in str(error.value)
    assert "rows.csv" in str(error.value)


def test_t41_every_bad_row_is_counted(tmp_path):
    with pytest.raises(DataError) as error:
        read_csv(written(tmp_path, "text,label\n" + "a,b,c\n" * 9 + "a,b\n" * 20))
    assert "4 more lines" in str(error.value)
    assert "double quotes" in str(error.value)


def test_t42_nearest_column(tmp_path):
    table = read_csv(written(tmp_path, "message,label\na,b\n"))
    assert table.missing("message") is None
    assert "'message'" in table.missing("mesage")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(DataError, match="folder"):
        read_csv(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "naïve"),
        ("cp1252", "Die Größe ändert sich für große Läden"),
        ("cp1252", "Où est la bibliothèque ? Ça va"),
        ("cp1251", "Привет как дела это текст"),
        ("shift_jis", "これは日本語のテキストです。問題がありますか"),
        ("gb18030", "这是一个中文文本请帮助我们解决问题"),
    ],
)
def test_t41_an_older_encoding_is_found_and_said(tmp_path, encoding, text):
    table = read_csv(written(tmp_path, "text,label\nfine,x\n" + f"{text},y\n" * 5, encoding))
    assert [row["text"] for row in table.rows] == ["fine", *[text] * 5]
    assert table.encoding == encoding
    assert "line 3, byte" in table.notes[0]


def test_t41_without_a_header(tmp_path):
    path = written(tmp_path, 'ham\tsay "hi\nspam\t"win\n')
    for table in (read_csv(path, {"1", "2"}), read_csv(path, form=Form(header=False))):
        assert table.columns == ["1", "2"]
        assert [row["2"] for row in table.rows] == ['say "hi', '"win']
        assert table.lines == [1, 2]
        assert any("quotes" in note for note in table.notes)
    with pytest.raises(DataError, match="line 2 has 1 field, line 1 has 2"):
        read_csv(written(tmp_path, "a,b\nc\n"), form=Form(header=False))


def test_packed(tmp_path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\na,b\n"))
    assert read_csv(path).rows == [{"text": "a", "label": "b"}]
