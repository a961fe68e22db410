"""T30: truncation is counted; it takes the question's begin before it takes the answer, and past a share it is an error."""

from __future__ import annotations

import json

import pytest
from language_bases import features_of, llama_like, save, t5_like, task_of

from afina.errors import DataError
from afina.tasks.task import IGNORED
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare

LONG = "Name seven fruits that are red, and say where they grow. " * 11
ROWS = [{"text": "Why?", "label": "No."}, {"text": LONG + "Why?", "label": "It jumps."}, {"text": "Why?", "label": LONG}]
BOTH = {"text": LONG, "label": LONG}


def aimed(feature):
    return [t for t, label in zip(feature["input_ids"], feature["labels"], strict=True) if label != IGNORED]


def test_t30_a_question_is_cut_from_the_left_and_the_answer_stays_whole():
    tokenizer = llama_like()
    rows = [*ROWS, BOTH]
    task = task_of("causal_lm", tokenizer, rows)
    whole, short = features_of(task, rows, limit=1000), features_of(task, rows, length=47)
    assert (whole.truncated, short.truncated) == (0, 3)
    assert [len(f["input_ids"]) for f in short.features[1:]] == [47] * 3
    first, question, answer, both = short.features
    assert aimed(question) == aimed(whole.features[1])
    assert question["input_ids"][0] == tokenizer.bos_token_id
    kept = question["input_ids"][1 : question["answer_at"]]
    assert kept == whole.features[1]["input_ids"][: whole.features[1]["answer_at"]][-len(kept) :]
    assert first["input_ids"] == whole.features[0]["input_ids"]
    lefts = (whole.features[2]["answer_at"], 47 // 4)
    for feature, uncut, left in zip((answer, both), whole.features[2:], lefts, strict=True):
        assert feature["answer_at"] == left
        assert aimed(feature) == aimed(uncut)[: 47 - left]
    assert tokenizer.eos_token_id not in aimed(answer)  # to stop in the middle of a sentence is not taught
    assert sum("1 questions" in note or "2 answers" in note for note in short.notes) == 2


def test_t30_source_and_target_are_each_counted(tmp_path):
    task = task_of("seq2seq", t5_like(), ROWS, max_target_length=11)
    task.load_model(str(save(tmp_path / "base", "T5")))
    made = features_of(task, ROWS, length=17)
    assert made.truncated == 2
    assert [note[:2] for note in made.notes] == ["1 ", "1 "]
    end = task.tokenizer.eos_token_id
    assert all(len(f["input_ids"]) <= 17 and f["input_ids"][-1] == end for f in made.features)
    assert [f["labels"][-1] == end for f in made.features] == [True, True, False]
    assert len(made.features[2]["labels"]) == 11


@pytest.mark.parametrize("name", ["causal_lm", "seq2seq"])
def test_t30_too_many_cut_rows_stop_the_run_before_it_begins(name, tmp_path):
    columns = ("instruction", "output") if name == "causal_lm" else ("source", "target")
    rows = [dict(zip(columns, (f"{i} {LONG}" if i % 2 else f"{i}?", f"{i} is it"), strict=True)) for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = save(tmp_path / "base", "Llama" if name == "causal_lm" else "T5")
    recipe = Recipe(
        task={"name": name},
        model=str(base),
        data=DataOptions(file=str(tmp_path / "rows.jsonl")),
        training=TrainingOptions(precision="fp32", max_length=23, max_truncated=0.4),
    )
    recipe.data.clean.near_duplicates = "ignore"
    with pytest.raises(DataError, match=r"15 of 30 texts \(50%\) are longer than 23 tokens.*max_truncated"):
        prepare(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    recipe.training.max_truncated = 0.6
    assert prepare(recipe, tmp_path / "run").encoded.truncated == 15
