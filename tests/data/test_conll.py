"""Columns of words and tags, from files as people have them."""

from __future__ import annotations

import json
import random

import pytest

from afina.data.conll import read_conll
from afina.data.read import read_table
from afina.errors import DataError

SENTENCES = [
    [("EU", "B-ORG"), ("rejects", "O"), ("German", "B-MISC"), ("call", "O"), (".", "O")],
    [("#", "O")],
    [("Łódź", "B-LOC"), ("🎉", "O"), ('"', "O"), ("l'Été", "I-LOC"), (";", "O")],
]
LINES = "\n\n".join("\n".join(f"{w} {t}" for w, t in s) for s in SENTENCES)


def written(folder, text, name="rows.conll", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def sentences(table):
    words, tags = ([json.loads(row[name]) for row in table.rows] for name in ("tokens", "tags"))
    return [list(zip(w, t, strict=True)) for w, t in zip(words, tags, strict=True)]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        lambda t: t + "\n\n\n",
        lambda t: "\n\n" + t + "\n",
        lambda t: t.replace("\n\n", "\n \t\n"),
        lambda t: t.replace("\n\n", "\n\t\n\n"),
        lambda t: t.replace("\n", "\r\n"),
        lambda t: "-DOCSTART- -X-\n\n" + t.replace("\n\n", "\n\n-DOCSTART- -X-\n\n"),
        lambda t: "\ufeff" + t,
        lambda t: t.replace(" ", "\t"),
        lambda t: t.replace(" ", "   "),
    ],
)
@pytest.mark.parametrize("name", ["rows.conll", "rows.txt", "rows.tsv", "rows"])
def test_the_same_sentences_however_they_are_written(tmp_path, change, name):
    table = read_conll(written(tmp_path, change(LINES), name))
    assert sentences(table) == SENTENCES
    assert (table.text, table.label, table.columns) == ("tokens", "tags", ["tokens", "tags"])


def test_lines_are_those_where_sentences_begin(tmp_path):
    assert read_conll(written(tmp_path, "\n\n" + LINES)).lines == [3, 9, 11]
    assert read_conll(written(tmp_path, "-DOCSTART- O\n\n" + LINES)).lines == [3, 9, 11]


def test_more_columns_go_by_number_and_tabs_allow_spaces(tmp_path):
    table = read_conll(written(tmp_path, "New York\tNNP\tI-NP\tB-LOC\nis\tVBZ\tI-VP\tO\n"))
    assert table.columns == ["tokens", "2", "3", "tags"]
    assert json.loads(table.rows[0]["tokens"]) == ["New York", "is"]
    assert json.loads(table.rows[0]["2"]) == ["NNP", "VBZ"]


def test_words_alone_can_be_read_to_be_answered(tmp_path):
    table = read_conll(written(tmp_path, "Paris\nis\n\nnice\n"))
    assert (table.columns, table.label, len(table.rows)) == (["tokens"], "", 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("EU B-ORG\nrejects\ncall O\n", r"line 2 has 1 column \('rejects'\), most lines have 2"),
        ("EU B-ORG\n\ncall O O\nX O\n", r"line 3 has 3 columns"),
        ("EU\tB-ORG\n\tO\ncall\tO\n", r"line 2 has nothing in column 1"),
        ("EU\tB-ORG\nX\t\ncall\tO\n", r"line 2 has nothing in column 2"),
        ("\n \n\t\n", "holds no words"),
        ("".join(f"w{i} O\n" if i % 3 else f"w{i}\n" for i in range(40)), r"9 more lines are like that.*white space"),
    ],
)
def test_what_does_not_fit_names_the_line(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        read_conll(written(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "text,label\nhello,ham\n\nbye,spam\n"),
        ("rows.jsonl", '{"tokens": ["a"], "tags": ["O"]}\n'),
        ("rows.txt", "a letter\nof two lines\n\nand a third line here\n"),
        ("rows.tsv", "text\tlabel\nhello\tham\nbye\tspam\n"),
        ("rows.txt", "word\nword\n\nword\n"),
    ],
)
def test_other_forms_are_left_to_others(tmp_path, name, text):
    assert read_conll(written(tmp_path, text, name)) is None


def test_a_folder_of_sides(tmp_path):
    for name, chosen in (("train", SENTENCES), ("dev", SENTENCES[:1]), ("test", SENTENCES[1:])):
        written(tmp_path, "\n\n".join("\n".join(f"{w}\t{t}" for w, t in s) for s in chosen), f"{name}.conll")
    table = read_table(tmp_path, read=read_conll)
    assert table.sides == ["train"] * 3 + ["validation"] + ["test"] * 2
    assert table.lines == ["train.conll:1", "train.conll:7", "train.conll:9", "dev.conll:1", "test.conll:1", "test.conll:3"]
    assert sentences(table) == [*SENTENCES, *SENTENCES[:1], *SENTENCES[1:]]
    assert read_conll(tmp_path) is None
    assert read_conll(tmp_path / "absent.conll") is None


def test_any_words_come_back(tmp_path):
    """Whatever letters words have, but white space."""
    chance = random.Random(0)
    letters = "aÉßд中🎉\u0301\u200d'\"#,;-|\\{}[]0"
    for separator in (" ", "\t"):
        made = [
            [("".join(chance.choices(letters, k=chance.randrange(1, 7))), chance.choice(["O", "B-x", "I-y-z"]))
             for _ in range(chance.randrange(1, 9))]
            for _ in range(53)
        ]  # fmt: skip
        text = "\n\n".join("\n".join(f"{w}{separator}{t}" for w, t in s) for s in made)
        assert sentences(read_conll(written(tmp_path, text))) == made
