"""T41, T42: files that are broken in one way or another, given to the command line: an error that names the place and the
cure, or a repair that is counted; never a traceback, and nothing written."""

from __future__ import annotations

import gzip
import json
import sys

import pytest
from rows_made import texts
from tiny_bases import save_bert

from afina.cli.main import main

TEXTS = texts(24)
ROWS = [(text, "ab"[i % 2]) for i, text in enumerate(TEXTS)]
PLAIN = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
LINES = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)


def changed(number, line):
    """The plain file with another line (the header is line 1)."""
    lines = PLAIN.splitlines()
    lines[number - 1] = line
    return "\n".join(lines) + "\n"


# name -> file, content, options, what the error says
ERRORS = {
    "empty": ("r.csv", "", "", ["is empty", "give a file with"]),
    "blank": ("r.csv", " \n\n\t\n", "", ["is empty"]),
    "a header alone": ("r.csv", "text,label\n", "", ["no rows", "data.header=false"]),
    "a row too long": ("r.csv", changed(5, "one, two,a"), "", ["line 5 has 3 fields", "double quotes"]),
    "a row too short": ("r.csv", changed(7, "one"), "", ["line 7 has 1 field,", "double quotes"]),
    "many rows too long": ("r.csv", PLAIN + "a,b,c\n" * 9, "", ["line 26 has 3 fields", "4 more lines are like that"]),
    "a quote left open": ("r.csv", changed(9, '"one,a'), "", ["begins in line 9 is never closed", "add the missing quote"]),
    "a quote in a quote": ("r.csv", changed(4, '"one "two" three",a'), "", ["line 4", 'is written twice ("")']),
    "two columns of one name": ("r.csv", PLAIN.replace("text,", "label,", 1), "", ["column 'label' 2 times", "rename"]),
    "no such column": ("r.csv", PLAIN, "--text txet", ["--text", "no column 'txet'", "Did you mean 'text'"]),
    "no column of a label": ("r.csv", PLAIN.replace("label", "n", 1), "", ["--label is missing", "one of text, n"]),
    "one column for both": ("r.csv", PLAIN, "--text label --label label", ["--text and --label are both 'label'"]),
    "a spreadsheet": ("r.csv", b"PK\x03\x04" + bytes(40), "", ["is a spreadsheet", "save it as CSV"]),
    "packed without saying so": ("r.csv", gzip.compress(PLAIN.encode()), "", ["packed by gzip", "end in .gz"]),
    "a packed file cut off": ("r.csv.gz", gzip.compress(PLAIN.encode())[:-9], "", ["no whole gzip file", "Pack it again"]),
    "a zero byte": ("r.csv", changed(6, "a\0b,a"), "", ["line 6 holds a zero byte"]),
    "UTF-16 without a mark": ("r.csv", PLAIN.encode("utf-16-le"), "", ["zero byte", "data.encoding=utf-16-le"]),
    "a broken letter": (
        "r.csv", changed(8, "grüße für größe,a").encode() + b"na\xefve und gro\xdf,b\n", "",
        ["line 26, byte 3 is 0xef", "iconv"],
    ),
    "another encoding than is said": (
        "r.csv", changed(3, "größe,a").encode("cp1252"), "data.encoding=utf-8",
        ["line 3, byte 3", "Leave data.encoding out"],
    ),
    "an encoding that is none": ("r.csv", PLAIN, "data.encoding=utf8000", ["data.encoding='utf8000' is no encoding"]),
    "a delimiter that is none": ("r.csv", PLAIN, "data.delimiter=colon", ["data.delimiter='colon'", "'comma'"]),
    "another delimiter than is said": ("r.csv", PLAIN, "data.delimiter=semicolon --text text", ["no column 'text'"]),
    "JSON cut off": ("r.json", json.dumps([{"text": "a", "label": "b"}])[:-2], "", ["not valid JSON", "line 1, column"]),
    "JSON that is one number": ("r.json", "17", "", ["expected a list of rows"]),
    "a line that is no JSON": ("r.jsonl", LINES + "{text: a}\n", "", ["line 25, column 2"]),
    "a line that is no object": ("r.jsonl", LINES + '["a", "b"]\n', "", ["line 25 is", "expected an object"]),
    "a list in the place of a text": (
        "r.jsonl", LINES + '{"text": ["a"], "label": "b"}\n', "", ["--text", "line 25, column 'text'", "expected a text"],
    ),
    "a Parquet file that is none": ("r.parquet", b"PAR1 and no more", "", ["no whole Parquet file"]),
    "no label at all": (
        "r.csv", "text,label\n" + "".join(f"{t},\n" for t in TEXTS), "", ["both a text and a label", "24 rows"],
    ),
    "one class": ("r.csv", PLAIN.replace(",b\n", ",a\n"), "", ["'a' in every row"]),
    "a class with one row": ("r.csv", PLAIN + "alone,c\n", "", ["class 'c' has 1 row (line 26)", "Add rows"]),
    "a label that is a number of its own in each row": (
        "r.csv", "text,label\n" + "".join(f"{t},{i}\n" for i, t in enumerate(TEXTS)), "", ["is this the label?"],
    ),
    "empty texts where none may be": (
        "r.csv", changed(11, ",a"), "data.clean.empty=false", ["no text (line 11)", "empty=true"],
    ),
    "dates that are none": ("r.csv", PLAIN, "data.time=text", ["column 'text'", "cannot be read as a time", "line 2:"]),
    "sides that are none": ("r.csv", PLAIN, "data.split_column=label", ["say neither train", "line 2: 'a'"]),
    "a column of groups that is not there": ("r.csv", PLAIN, "data.group=labels", ["data.group", "Did you mean 'label'"]),
    "a way of dividing without its column": ("r.csv", PLAIN, "data.split=time", ["data.split=time", "data.time is missing"]),
    "shares that leave nothing": ("r.csv", PLAIN, "data.validation=0.5 data.test=0.5", ["less than a tenth"]),
    "a step of cleaning that is none": ("r.csv", PLAIN, "data.clean.duplicate=false", ["Did you mean 'duplicates'"]),
    "a step that is asked for wrongly": ("r.csv", PLAIN, "data.clean.near_duplicates=no", ["near_duplicates", "together"]),
    "a step that is no yes or no": ("r.csv", PLAIN, "data.clean.unicode=maybe", ["unicode", "expected true or false"]),
    "a share that is too large": ("r.csv", PLAIN, "data.test=0.9", ["data.test=0.9", "at most 0.5"]),
    "a balance that is none": ("r.csv", PLAIN, "data.balance=over", ["data.balance='over'", "'oversample'"]),
    "the test file again": ("r.csv", PLAIN, "data.test_file={file}", ["must be different files"]),
}  # fmt: skip


def spoken(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["afina", *words])
    with pytest.raises(SystemExit) as left:
        main()
    out = capsys.readouterr()
    return left.value.code or 0, " ".join((out.out + out.err).split())


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", ERRORS)
def test_t41_broken_files_end_in_an_error_that_says_where_and_how_to_mend_it(name, base, tmp_path, monkeypatch, capsys):
    file, content, options, said = ERRORS[name]
    path = written(tmp_path, file, content)
    if "parquet" in file:
        pytest.importorskip("pyarrow")
    words = ["--data", str(path), *options.format(file=path).split()]
    for command in (["prepare"], ["train", "--dry-run", "--model", str(base)]):
        code, heard = spoken(monkeypatch, capsys, [*command, *words, "--output", str(tmp_path / "out")])
        assert code == 1
        assert "Traceback" not in heard
        for words_said in said:
            assert words_said in heard
        assert not (tmp_path / "out").exists()


# name -> file, content, options, what is said, rows that are kept
REPAIRS = {
    "spaces around the header": ("r.csv", PLAIN.replace("text,label", " text , label ", 1), "", [], 24),
    "a byte order mark": ("r.csv", b"\xef\xbb\xbf" + PLAIN.encode(), "", [], 24),
    "UTF-16": ("r.csv", PLAIN.encode("utf-16"), "", [], 24),
    "semicolons": ("r.csv", PLAIN.replace(",", ";"), "", [], 24),
    "bars, said": ("r.csv", PLAIN.replace(",", "|"), "data.delimiter=bar", [], 24),
    "line ends of Windows": ("r.csv", PLAIN.replace("\n", "\r\n"), "", [], 24),
    "blank lines between": ("r.csv", PLAIN.replace("\n", "\n\n"), "", [], 24),
    "no header": (
        "r.csv", PLAIN.partition("\n")[2], "--text 1 --label 2", ["read as a file without a header"], 24,
    ),
    "no header, said": ("r.csv", PLAIN.partition("\n")[2], "--text 1 --label 2 --no-header", [], 24),
    "an old encoding": (
        "r.csv", (PLAIN + "größere Häuser für Müller,a\n").encode("cp1252"), "", ["read as cp1252", "line 26, byte 3"], 25,
    ),
    "an old encoding, said": ("r.csv", (PLAIN + "größer,a\n").encode("cp1252"), "data.encoding=windows-1252", [], 25),
    "letters read wrongly": (
        "r.csv", PLAIN + "schÃ¶ne GrÃ¼ÃŸe,a\n", "", ["1 row repaired: letters were read in a wrong encoding", "line 26"], 25,
    ),
    "control characters": ("r.csv", PLAIN + "bell\x07 rings,a\n", "", ["repaired", "control characters (line 26)"], 25),
    "empty texts": ("r.csv", PLAIN + " ,a\n,b\n", "", ["2 rows dropped: the text is empty (line 26, 27)"], 24),
    "missing labels": ("r.csv", PLAIN + "one,\n", "", ["1 row dropped: the label is missing (line 26)"], 24),
    "texts that say nothing": (
        "r.csv", PLAIN + "...,a\n?!,b\n", "data.clean.min_letters=1", ["2 rows dropped: too few letters", "line 26, 27"], 24,
    ),
    "copies": ("r.csv", PLAIN + PLAIN.partition("\n")[2], "", ["24 rows dropped: the same text with the same label"], 24),
    "labels spelled in two ways": ("r.csv", PLAIN + "one, A\n", "", ["label 'A' is read as 'a'"], 25),
    "a text under two labels": (
        "r.csv", PLAIN + "one,a\nOne,b\n", "", ["2 rows dropped: the same text stands under different labels"], 24,
    ),
    "white space": (
        "r.csv", PLAIN + "one  \t two,a\n", "data.clean.white_space=true",
        ["1 row repaired: runs of white space (line 26)"], 25,
    ),
    "lines of JSON called .json": ("r.json", LINES, "", [], 24),
    "JSON below a key": (
        "r.json", json.dumps({"version": 2, "rows": [dict(zip(("text", "label"), row, strict=True)) for row in ROWS]}), "",
        ["the rows are read from the key 'rows'"], 24,
    ),
    "JSON with keys that are absent": (
        "r.jsonl", LINES + '{"text": "x"}\n', "", ["1 row dropped: the label is missing"], 24,
    ),
    "packed": ("r.csv.gz", gzip.compress(PLAIN.encode()), "", [], 24),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRS)
def test_t41_what_is_repaired_is_counted_and_said(name, tmp_path, monkeypatch, capsys):
    file, content, options, said, kept = REPAIRS[name]
    path = written(tmp_path, file, content)
    words = ["prepare", "--data", str(path), *options.split(), "--output", str(tmp_path / "out")]
    code, heard = spoken(monkeypatch, capsys, words)
    assert code == 0, heard
    for words_said in said:
        assert words_said in heard
    read = lambda name: (tmp_path / "out" / name).read_text(encoding="utf-8")
    report = json.loads(read("data_report.json"))
    assert report["kept"] == kept == sum(side["rows"] for side in report["splits"].values())
    rows = [json.loads(line) for side in report["splits"] for line in read(f"{side}.jsonl").splitlines()]
    assert {row[report["columns"]["text"]] for row in rows} >= set(TEXTS)
