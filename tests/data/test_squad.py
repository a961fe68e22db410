"""SQuAD's nested layout, and what a column of answers may hold."""

from __future__ import annotations

import json

import pytest

from afina.data.read import read_table
from afina.data.squad import parsed_answers, read_squad
from afina.errors import DataError


def squad(*paragraphs, **more):
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": list(paragraphs)}], **more}


def paragraph(context="Ana vive en Köln.", *questions):
    return {"context": context, "qas": list(questions) or [asked("¿Dónde vive Ana?", ("Köln", 12))]}


def asked(question, *answers, **more):
    found = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": "q", "question": question, "answers": found, **more}


def written(folder, content, name="rows.json"):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_one_row_a_question(tmp_path):
    second = asked("¿Y cuándo?", is_impossible=True, plausible_answers=[{"text": "Köln", "answer_start": 12}])
    content = squad(paragraph(), paragraph("Otro.", asked("¿Qué?", ("Otro", 0)), second))
    table = read_squad(written(tmp_path, content))
    assert table.lines == [1, 2, 3]
    assert [row["question"] for row in table.rows] == ["¿Dónde vive Ana?", "¿Qué?", "¿Y cuándo?"]
    assert [parsed_answers(row["answers"]) for row in table.rows] == [[("Köln", 12)], [("Otro", 0)], []]
    assert (table.text, table.label, table.rows[0]["title"]) == ("question", "answers", "T")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (squad({"context": "x"}), r"data\[0\]\.paragraphs\[0\] has no list 'qas'"),
        (squad(paragraph("x", {"question": "y", "answers": "z"})), r"qas\[0\]\.answers is \"z\"; expected a list"),
        (squad(paragraph("x", {"answers": []})), r"paragraphs\[0\]\.qas\[0\] has no text 'question'"),
        (squad({"qas": [asked("y", ("x", 0))]}), r"paragraphs\[0\] has no text 'context'"),
        (squad(paragraph("x", asked("y", is_impossible=False))), "no answers, but is_impossible is false"),
        (squad(paragraph("x", asked("y", ("x", 0), is_impossible=True))), "has answers, but is_impossible is true"),
        (squad({"context": "x", "qas": []}), "has no questions"),
        ({"data": [{"paragraphs": [paragraph()]}, {"title": "x"}]}, r"data\[1\] has no list 'paragraphs'"),
    ],
)
def test_what_is_lacking_is_said_with_its_place(tmp_path, content, said):
    with pytest.raises(DataError, match=said):
        read_squad(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('[{"question": "a"}]', "rows.json"),
        ('{"data": [{"question": "a"}]}', "rows.json"),
        ('{"data": [', "rows.json"),
        ("{}", "rows.jsonl"),
    ],
)
def test_other_forms_are_left_to_others(tmp_path, content, name):
    assert read_squad(written(tmp_path, content, name)) is None
    assert read_squad(tmp_path / "absent.json") is None


def test_a_folder_of_sides(tmp_path):
    for name in ("train", "dev"):
        written(tmp_path, squad(paragraph()), f"{name}.json")
    table = read_table(tmp_path, read=read_squad)
    assert (table.sides, table.lines) == (["train", "validation"], ["train.json:1", "dev.json:1"])


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ('{"text": ["a", "b"], "answer_start": [0, 7]}', [("a", 0), ("b", 7)]),
        ('{"text": [], "answer_start": []}', []),
        ('{"text": "a", "answer_start": 3}', [("a", 3)]),
        ('{"text": ["a"]}', [("a", None)]),
        ('[{"text": "a", "answer_start": 3}]', [("a", 3)]),
        ('["a", "b"]', [("a", None), ("b", None)]),
        ("[]", []),
        ("a plain answer", [("a plain answer", None)]),
    ],
)
def test_forms_of_answers(cell, answers):
    assert parsed_answers(cell) == answers


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("{'text': ['a'], 'answer_start': [0]}", "are no JSON"),
        ('{"text": ["a", "b"], "answer_start": [0]}', "as many starts as texts"),
        ('{"answer": "a"}', "expected an answer's text"),
        ('{"text": ["a"], "answer_start": ["0"]}', "expected an answer's text"),
        ('{"text": ["a"], "answer_start": [true]}', "expected an answer's text"),
        ("[3]", "expected an answer's text"),
        ('{"text": [" "], "answer_start": [0]}', "an answer is empty"),
    ],
)
def test_what_is_no_answer(cell, said):
    with pytest.raises(ValueError, match=said):
        parsed_answers(cell)
