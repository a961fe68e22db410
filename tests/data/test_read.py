"""Every form of labelled texts gives the same table, and what is broken is named with its row and column."""

from __future__ import annotations

import gzip
import json

import pytest

from afina.data.read import read_table
from afina.errors import DataError

ROWS = [{"text": f'n {i}, "é"\n', "label": "ab"[i % 2], "n": str(i)} for i in range(7)]


def as_csv(rows):
    quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
    return ",".join(rows[0]) + "\n" + "\n".join(quoted) + "\n"


FORMS = {
    "rows.csv": as_csv,
    "rows.tsv": lambda rows: as_csv(rows).replace('",', '"\t').replace("text,label,n", "text\tlabel\tn"),
    "rows.json": json.dumps,
    "data.json": lambda rows: json.dumps({"version": 1, "data": rows}),
    "columns.json": lambda rows: json.dumps({name: [row[name] for row in rows] for name in rows[0]}),
    "lines.json": lambda rows: "\n".join(map(json.dumps, rows)),
    "rows.jsonl": lambda rows: "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, name, packed):
    content = FORMS[name](ROWS).encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    assert read_table(path, {"text"}).rows == ROWS


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "n": int(row["n"])} for row in ROWS]), path)
    assert read_table(path).rows == ROWS
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="no whole Parquet file"):
        read_table(path)
    with pytest.raises(DataError, match="no file"):
        read_table(tmp_path / "none.parquet")


def test_folders_of_texts_and_of_splits(tmp_path):
    for name, text in (("ham/1.txt", "hello"), ("spam/2.txt", "größer".encode("cp1252")), ("spam/3.txt", "win")):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    table = read_table(tmp_path / "texts")
    assert [(r["text"], r["label"]) for r in table.rows] == [("hello", "ham"), ("größer", "spam"), ("win", "spam")]
    assert table.lines == ["ham/1.txt", "spam/2.txt", "spam/3.txt"]
    assert "cp1252" in table.notes[0]

    sides = tmp_path / "sides"
    sides.mkdir()
    for name in ("train.csv", "val.jsonl", "test.csv"):
        (sides / name).write_text(FORMS["rows" + name[name.index(".") :]](ROWS), encoding="utf-8")
    table = read_table(sides)
    assert table.rows == ROWS * 3
    assert table.sides == ["train"] * 7 + ["validation"] * 7 + ["test"] * 7
    assert table.lines[7] == "val.jsonl:1"
    (sides / "dev.csv").write_text("text,label\na,b\n")
    with pytest.raises(DataError, match="two validation files"):
        read_table(sides)
    (sides / "dev.csv").unlink()
    (sides / "test.csv").write_text("text,lable\na,b\n")
    with pytest.raises(DataError, match=r"test\.csv lacks the column 'label'"):
        read_table(sides, {"label"})
    with pytest.raises(DataError, match=r"holds sides, texts; expected"):
        read_table(tmp_path)


def test_values_that_are_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"t": "a", "l": 1, "x": [1]}\n{"t": null, "l": true}\n')
    table = read_table(path, {"t", "l", "x y"})
    assert table.rows == [{"t": "a", "l": "1", "x": "[1]"}, {"t": "", "l": "true", "x": ""}]
    assert table.nested == {"x": "line 1, column 'x' is [1]"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b'[{"t": "a",]', "line 1, column 12"),
        ("a.json", b"3", "expected a list of rows"),
        ("a.json", b'{"t": "a"}', "one object with the keys t"),
        ("a.json", b'["a", "b"]', 'row 1 is "a"'),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"t": "a"}\n{"t": b}\n', "line 2, column 7"),
        ("a.jsonl", b"[\n", "let its name end in .json"),
        ("a.jsonl", b'{"t": 1}\n3\n', "line 2 is 3"),
        ("a.jsonl", '{"t": "füß"}\n'.encode() + b"\xff", "line 2, byte 1 is 0xff"),
        ("a.parquet", b"PAR1", "no whole Parquet file"),
        ("a.csv.gz", b"text", "no whole gzip file"),
        ("a.csv", gzip.compress(b"text,label\n", mtime=0), "let its name end in .gz"),
    ],
)
def test_t41_what_cannot_be_read_is_named(tmp_path, name, content, said):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_table(path, {"t"})
    assert said in str(error.value)
    assert name in str(error.value)
