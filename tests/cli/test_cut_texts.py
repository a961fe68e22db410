"""T30 after training: a text that is longer than those of training could be is answered, and it is said to be cut."""

from __future__ import annotations

import csv

from language_bases import save


def test_t30_a_text_that_is_cut_off_to_be_answered_is_told(afina, places, tmp_path):
    run = tmp_path / "run"
    words = ["train", "--data", places / "rows.csv", "--text", "message", "--label", "label", "--model", places / "base"]
    said = afina(*words, "--output", run, "--epochs", 1, "--max-length", 9, "training.max_truncated=1.0")
    assert said.code == 0, said.err
    said = afina("predict", run, "--text", "w1 w2 " * 20, "--text", "w3 late")
    assert (said.code, "1 of 2 texts" in said.err, "at 9 tokens" in said.err) == (0, True, True)
    assert "cut off" not in afina("predict", run, "--text", "w3 late").err
    assert "rows are cut off at 9 tokens" in afina("evaluate", run).out


def test_a_conversation_is_asked_for_from_the_command_line(afina, tmp_path):
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        subjects = [f"{a} {b}" for a in ("fox", "dog", "gos", "fruit") for b in ("red", "small", "lazy", "brown", "quick")]
        csv.writer(file).writerows([["prompt", "completion"], *((f"Why {s}?", f"No {s}.") for s in subjects)])
    run, base = tmp_path / "run", save(tmp_path / "base", "Llama")
    said = afina("train", "--task", "causal_lm", "--data", tmp_path / "rows.csv", "--model", base, "--output", run,
                 "--epochs", 1, "task.max_new_tokens=7", "task.train_on=answers")  # fmt: skip
    assert said.code == 0, said.err
    for part in ("### Instruction:", "the answers alone are learned", "supervised", "loss per token", "the base, not tuned"):
        assert part in said.out, part
    assert "ROUGE" not in said.out  # nothing was written, so nothing is compared
    talk = '[{"role": "user", "content": "Why fox?"}]'
    answers = [afina("predict", run, "--json", "--text", text).out for text in ("Why fox?", talk)]
    assert answers[0].split('"answer"')[1] == answers[1].split('"answer"')[1]
    other = ["--model", base, "--output", tmp_path / "other"]
    said = afina("train", "--task", "causal_lm", "--data", tmp_path / "rows.csv", *other,
                 "training.best=rouge_l", "task.train_on=question")  # fmt: skip
    assert said.code
    assert "training.best" in said.err
    assert "task.train_on" in said.err
