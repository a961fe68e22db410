"""Tags of words and answers in a context, through the commands a person types, from files as they come."""

from __future__ import annotations

import csv
import json
import random

import pytest
from text_bases import save, wordpiece

from afina.core.files import read_weights

NAMES, PLACES = ["Ana", "Zoë", "Łukasz", "Nguyễn", "Iñaki"], ["Köln", "León", "Århus", "Ñuñoa", "Besançon"]
OTHERS = ["vive", "en", "fue", "a", "con", "y", ".", ",", "🎉"]


def sentences(count, seed):
    chance = random.Random(seed)
    for _ in range(count):
        words = [(w, "O") for w in chance.choices(OTHERS, k=chance.randrange(2, 9))]
        words.insert(chance.randrange(len(words)), (chance.choice(NAMES), "B-person"))
        words.insert(chance.randrange(len(words)), (chance.choice(PLACES), "B-place"))
        yield words


def paragraphs(count, seed, facts=3):
    """In SQuAD's nested layout, version 2; one question of each context has no answer."""
    chance, made = random.Random(seed), []
    for i in range(count):
        people, places = chance.sample(NAMES, facts), chance.sample(PLACES, facts)
        facts_ = " ".join(f"{n} vive en {p}." for n, p in zip(people, places, strict=True))
        context = "\ufeff" * (i % 2) + f"Nota {i}. {facts_}"
        asked = [{"id": f"{i}-{n}", "question": f"¿Dónde vive {n}?", "is_impossible": False,
                  "answers": [{"text": p, "answer_start": context.index(p)}]}
                 for n, p in zip(people, places, strict=True)]  # fmt: skip
        other = next(n for n in NAMES if n not in people)
        asked.append({"id": f"{i}-x", "question": f"¿Dónde vive {other}?", "is_impossible": True, "answers": []})
        made.append({"context": context, "qas": asked})
    return {"version": "v2.0", "data": [{"title": "Notas", "paragraphs": made}]}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    texts = [" ".join([*NAMES, *PLACES, *OTHERS, "¿Dónde", "?", "Nota"])] * 3
    save(folder / "base", wordpiece(texts, size=400), hidden=32)
    (folder / "ner").mkdir()
    for name, count in (("train", 151), ("dev", 17), ("test", 23)):
        lines = "\n \t\n".join("\n".join(f"{w}\t{t}" for w, t in s) for s in sentences(count, name))
        (folder / "ner" / f"{name}.conll").write_text("-DOCSTART-\tO\n\n" + lines, encoding="utf-8")
    (folder / "qa.json").write_text(json.dumps(paragraphs(31, 0), ensure_ascii=False), encoding="utf-8")
    return folder


def trained(afina, places, name, output, *words):
    said = afina(
        "train", "--task", name, "--data", places / words[0], "--model", places / "base", "--output", output,
        "--precision", "fp32", "--learning-rate", "1e-2", "target_modules=all-linear", *words[1:],
    )  # fmt: skip
    assert said.code == 0, said.err
    return said


def test_tags_from_columns_to_answers(afina, places, tmp_path):
    run = tmp_path / "run"
    said = trained(afina, places, "token_classification", run, "ner", "--epochs", "24", "r=5")
    assert "tags: IOB2" in said.out
    assert "entity F1" in said.out
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["f1"] > 0.9 > metrics["baselines"]["majority"]["f1"] == 0
    assert metrics["test"]["per_type"].keys() == {"person", "place"}
    assert any("classifier" in key for key in read_weights(run / "adapter" / "adapter_model.safetensors"))

    text = "con Zoë, vive  en Köln."
    answer = json.loads(afina("predict", run, "--text", text, "--json").out)
    assert [(e["text"], e["type"]) for e in answer["entities"]] == [("Zoë", "person"), ("Köln", "place")]
    assert [text[e["start"] : e["end"]] for e in answer["entities"]] == ["Zoë", "Köln"]
    assert all(0 < e["probability"] <= 1 for e in answer["entities"])
    assert "Zoë (person" in afina("predict", run, "--text", text).out

    again = json.loads(afina("evaluate", run, "--json").out)
    assert again["per_type"] == metrics["test"]["per_type"]
    learned = json.loads(afina("evaluate", run, "--data", run / "data" / "train.csv", "--json").out)
    assert learned["f1"] > 0.97
    file = json.loads(afina("evaluate", run, "--data", places / "ner" / "test.conll", "--json").out)
    assert file["rows"] >= again["rows"]
    said = afina("predict", run, "--data", places / "ner" / "test.conll", "--output", tmp_path / "out.csv")
    assert said.code == 0, said.err
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as out:
        rows = list(csv.DictReader(out))
    assert len(rows) == 23
    assert any("(place, " in row["answer"] for row in rows)
    assert all(len(json.loads(row["tokens"])) == len(row["answer_tags"].split()) for row in rows)
    assert sum(json.loads(row["tags"]) == row["answer_tags"].split() for row in rows) > 18


def test_answers_from_squad_to_json(afina, places, tmp_path):
    run = tmp_path / "run"
    said = trained(
        afina, places, "question_answering", run, "qa.json", "--epochs", "3", "r=5", "--max-length", "23", "task.stride=5"
    )
    assert "some questions have no answer" in said.out
    assert "questions are read in" in said.out
    assert any("qa_outputs" in key for key in read_weights(run / "adapter" / "adapter_model.safetensors"))  # T5
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["task"]["options"]["stride"] == 5
    assert metrics["test"]["with_answer"]["rows"] == 3 * metrics["test"]["without_answer"]["rows"]
    assert set(metrics["baselines"]) >= {"overlap", "no_answer"}
    contexts = {}
    for side in ("train", "validation", "test"):
        with (run / "data" / f"{side}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                contexts.setdefault(row["context"], set()).add(side)
    assert len(contexts) == 31
    assert all(len(sides) == 1 for sides in contexts.values())  # T27
    assert sum(context.startswith("\ufeff") for context in contexts) == 15

    context = "\ufeff  Iñaki vive en León. Ana vive en Köln 🎉."
    words = ["predict", run, "--text", "¿Dónde vive Ana?", "--text-pair", context]
    answer = json.loads(afina(*words, "--json").out)
    assert {"answer", "start", "end", "probability", "no_answer_probability"} <= set(answer)
    if answer["answer"] is not None:
        assert context[answer["start"] : answer["end"]] == answer["answer"]
    assert afina(*words).code == 0
    again = json.loads(afina("evaluate", run, "--json").out)
    assert again["f1"] == metrics["test"]["f1"]
    assert json.loads(afina("evaluate", run, "--data", places / "qa.json", "--json").out)["rows"] == 124
    assert "--text-pair is missing" in afina("predict", run, "--text", "¿Dónde?").err
    said = afina("predict", run, "--data", places / "qa.json", "--output", tmp_path / "out.csv")
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("task", "file", "column"),
    [("token_classification", "ner/train.conll", "tags"), ("question_answering", "qa.json", "answers")],
)
def test_prepared_rows_are_lists_again_and_are_taken_as_they_are(afina, places, tmp_path, task, file, column):
    ready = tmp_path / "ready"
    said = afina("prepare", "--task", task, "--data", places / file, "--output", ready)
    assert said.code == 0, said.err
    lines = [json.loads(x) for x in (ready / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(isinstance(line[column], list) for line in lines)
    words = ["--task", task, "--data", ready, "--model", places / "base", "--output", tmp_path / "run", "--dry-run"]
    said = afina("train", *words)
    assert said.code == 0, said.err
    assert f"train {len(lines)}" in " ".join(said.out.split())


@pytest.mark.parametrize(
    ("name", "task", "content", "said"),
    [
        ("rows.conll", "token_classification", "Ana B-x\nvive\nen O\n", "line 2 has 1 column"),
        ("rows.jsonl", "token_classification", '{"tokens": ["a", "b"], "tags": ["O"]}\n' * 5, "line 1: 2 words and 1 tags"),
        ("rows.json", "question_answering", '{"data": [{"paragraphs": [{"context": "a"}]}]}', "has no list 'qas'"),
        ("rows.jsonl", "question_answering",
         '{"question": "q", "context": "uno dos", "answers": {"text": ["tres"], "answer_start": [4]}}\n' * 3,
         "line 1: the answer 'tres' is not at character 4, where 'dos' stands; it does not occur in the context"),
    ],
)  # fmt: skip
def test_broken_files_name_the_place(afina, places, tmp_path, name, task, content, said):
    (tmp_path / name).write_text(content, encoding="utf-8")
    run = tmp_path / "run"
    done = afina("train", "--task", task, "--data", tmp_path / name, "--model", places / "base", "--output", run)
    assert done.code == 1
    assert said in " ".join(done.err.split())
    assert not run.exists()
