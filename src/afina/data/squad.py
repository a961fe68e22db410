"""Reads questions in SQuAD's layout: articles that hold paragraphs, each a context and its questions, versions 1 and 2.

Flat rows (`question`, `context`, `answers`) need no reader of their own: what an `answers` column may hold is said by
`parsed_answers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.data.table import Table, decoded
from afina.errors import DataError, Problems

__all__ = ["parsed_answers", "read_squad"]

_WRONG = 5  # places named in an error
_FORMS = 'an answer\'s text, {"text": [...], "answer_start": [...]} or [{"text": ..., "answer_start": ...}, ...]'


def read_squad(path: Path) -> Table | None:
    """One row a question, numbered from 1: `question`, `context`, `answers` as JSON, `id`, `title`.

    None where the file is no JSON in SQuAD's layout. Raises DataError with every place that lacks something.
    """
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    text, encoding, notes = decoded(path)
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None  # told by whoever reads JSON of any layout
    articles = content.get("data") if isinstance(content, Mapping) else None
    if not isinstance(articles, list) or not any(isinstance(a, Mapping) and "paragraphs" in a for a in articles):
        return None
    problems = Problems(str(path))
    rows: list[dict[str, str]] = []
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(_listed(article, "paragraphs", f"data[{i}]", problems)):
            place = f"data[{i}].paragraphs[{j}]"
            for k, question in enumerate(_listed(paragraph, "qas", place, problems)):
                rows.append(_row(article, paragraph, question, place, f"{place}.qas[{k}]", problems))
    more = len(problems.found) - _WRONG
    del problems.found[_WRONG:]
    problems.raise_as(DataError, f"{more} more places are like that." if more > 0 else "")
    if not rows:
        raise DataError(f"{path} has no questions")
    columns, lines = ["question", "context", "answers", "id", "title"], list(range(1, len(rows) + 1))
    return Table(
        path, columns, rows, list(lines), "", encoding, notes, text="question", text_pair="context", label="answers",
        nested={"answers": "each row is a list"},
    )  # fmt: skip


def _listed(holder: Any, key: str, place: str, problems: Problems) -> list[Any]:
    value = holder.get(key) if isinstance(holder, Mapping) else None
    if not isinstance(value, list):
        problems.add(f"{place} has no list {key!r}")
        return []
    return value


def _row(article: Any, paragraph: Any, question: Any, place: str, here: str, problems: Problems) -> dict[str, str]:
    question = question if isinstance(question, Mapping) else {}
    context, asked, answers = paragraph.get("context"), question.get("question"), question.get("answers")
    for value, name, where in ((context, "context", place), (asked, "question", here)):
        if not isinstance(value, str):
            problems.add(f"{where} has no text {name!r}")
    none = question.get("is_impossible") is True
    if not isinstance(answers, list) and not none and answers is not None:
        problems.add(f"{here}.answers is {json.dumps(answers)[:40]}; expected a list")
    if answers == [] and question.get("is_impossible") is False:
        problems.add(f"{here} has no answers, but is_impossible is false")
    if none and answers:
        problems.add(f"{here} has answers, but is_impossible is true")
    known = "" if answers is None and not none else json.dumps(answers or [], ensure_ascii=False)
    found = {"question": asked, "context": context, "answers": known, "id": question.get("id", ""),
             "title": article.get("title", "")}  # fmt: skip
    return {name: str(value) for name, value in found.items()}


def parsed_answers(text: str) -> list[tuple[str, int | None]]:
    """Answers with their first characters (None: not said) out of what a column holds; none for no answer.

    Raises ValueError where it is nothing of the kind.
    """
    if not text.startswith(("{", "[")):
        return [(text, None)]
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the answers {text[:40]!r} are no JSON ({error}); expected {_FORMS}") from None
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        texts = [texts] if isinstance(texts, str) else texts
        starts = [starts] if isinstance(starts, int) else starts
        if isinstance(texts, list) and starts is None:
            starts = [None] * len(texts)
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError(f"the answers {text[:60]!r}: expected {_FORMS}, with as many starts as texts")
        pairs = list(zip(texts, starts, strict=True))
    else:
        pairs = [(v, None) if isinstance(v, str) else (v.get("text"), v.get("answer_start")) if isinstance(v, Mapping)
                 else (None, None) for v in value]  # fmt: skip
    for answer, start in pairs:
        if not isinstance(answer, str) or not (start is None or (isinstance(start, int) and not isinstance(start, bool))):
            raise ValueError(f"the answers {text[:60]!r}: expected {_FORMS}")
        if not answer.strip():
            raise ValueError("an answer is empty; where a question has no answer, write an empty list")
    return pairs
