"""Several labels, numbers and similar texts: from a file to answers, by the commands a person types."""

from __future__ import annotations

import csv
import json
import random

import numpy as np
import pytest
from tiny_bases import WORDS, save_bert

from afina.errors import AfinaError
from afina.training.recipe import DataOptions, Recipe
from afina.training.run import prepare

SMALL = ["--epochs", 4, "--batch-size", 8, "--learning-rate", "1e-2", "r=3"]


def texts(count):
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randrange(3, 12))) for _ in range(count)]


def write(path, columns, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("base"))


def test_several_labels(afina, base, tmp_path):
    labelled = [(t, ";".join(w for w in ("w1", "w2", "w3") if w in t.split()) or "[]") for t in texts(83)]
    data = write(tmp_path / "rows.csv", ["text", "tags"], labelled)
    run = tmp_path / "run"
    options = ["--task", "multi_label_classification", "task.thresholds=tuned", "task.calibrate=true"]
    said = afina("train", "--data", data, "--model", base, "--output", run, *SMALL, *options)
    assert said.code == 0, said.err
    for part in ("labels are separated by semicolons", "without any label", "mean average precision", "naive Bayes"):
        assert part in said.out, part
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["test"]["calibration"]) == {"temperature", "before", "after"}
    assert set(metrics["task"]) >= {"labels", "temperature", "thresholds"}
    answer = json.loads(afina("predict", run, "--text", "w1 w4", "--json").out)
    assert set(answer["probabilities"]) == {"w1", "w2", "w3"}
    assert set(answer["labels"]) <= {"w1", "w2", "w3"}
    assert afina("predict", run, "--data", data, "--output", tmp_path / "out.csv").code == 0
    rows = read(tmp_path / "out.csv")
    assert [row["tags"] for row in rows] == [label for _, label in labelled]
    thresholds = dict(zip(metrics["task"]["labels"], metrics["task"]["thresholds"], strict=True))
    for row in rows:
        reached = [name for name in thresholds if float(row[f"p({name})"]) >= thresholds[name]]
        assert row["answer"] == (", ".join(reached) or "[]")
    figures = json.loads(afina("evaluate", run, "--json").out)
    assert figures["mean_average_precision"] == pytest.approx(metrics["test"]["mean_average_precision"], abs=1e-6)


def test_a_number(afina, base, tmp_path):
    rows = [(t, f"{sum(int(w[1:]) for w in t.split())}") for t in texts(61)]
    data, run = write(tmp_path / "rows.csv", ["text", "score"], rows), tmp_path / "run"
    said = afina("train", "--data", data, "--model", base, "--output", run, *SMALL, "--task", "regression")
    assert said.code == 0, said.err
    for part in ("RMSE", "Spearman", "always the mean", "ridge"):
        assert part in said.out, part
    value = json.loads(afina("predict", run, "--text", "w1 w4", "--json").out)["value"]
    assert 0 < value < 400
    assert f"{value:.6g}" in afina("predict", run, "--text", "w1 w4").out
    wrong = write(tmp_path / "wrong.csv", ["text", "score"], [*rows[:20], ("w1 w2", "3,7"), ("w3", "much")])
    said = afina("train", "--data", wrong, "--model", base, "--output", tmp_path / "no", "--task", "regression")
    assert said.code != 0
    assert "line 22: '3,7' is no number; is the comma a decimal one? Write 3.7" in said.err
    assert "line 23: 'much' is no number" in said.err


def test_similar_texts(afina, base, tmp_path):
    some = texts(60)
    data = write(tmp_path / "pairs.csv", ["question", "answer"], [*zip(some[:30], some[30:], strict=True), ("w9", "")])
    run = tmp_path / "run"
    said = afina("train", "--data", data, "--model", base, "--output", run, *SMALL, "--task", "sentence_similarity")
    assert said.code == 0, said.err
    parts = ("1 row dropped: the text is empty", "nDCG@10", "recall@5", "the base, not tuned", "shared words (BM25)",
             "With 95 % confidence MRR@10")  # fmt: skip
    for part in parts:
        assert part in said.out, part
    figures = json.loads(afina("evaluate", run, "--json").out)
    tested = json.loads((run / "metrics.json").read_text())["test"]
    assert figures["mrr_at_10"] == pytest.approx(tested["mrr_at_10"], abs=1e-6)
    two = json.loads(afina("predict", run, "--text", "w1 w4", "--text-pair", "w5", "--json").out)
    alone = [json.loads(afina("predict", run, "--text", t, "--json").out)["vector"] for t in ("w1 w4", "w5")]
    assert two["similarity"] == pytest.approx(float(np.dot(*alone)), abs=1e-4)
    assert f"{two['similarity']:.6f}" in afina("predict", run, "--text", "w1 w4", "--text-pair", "w5").out
    assert afina("predict", run, "--data", data, "--output", tmp_path / "out.npz").code == 0
    found = np.load(tmp_path / "out.npz")
    assert found["text"].shape == found["text_pair"].shape == (31, 24)
    assert np.isnan(found["text"][30]).all()
    passages = write(tmp_path / "passages.csv", ["passage"], [(text,) for text in some[:7]])
    words = ["predict", run, "--data", passages, "--column", "passage", "--output"]
    assert afina(*words, tmp_path / "single.npz").code == 0
    np.testing.assert_allclose(np.load(tmp_path / "single.npz")["text"], found["text"][:7], atol=1e-5)
    assert "no column 'answer'" in afina(*words, tmp_path / "single.csv").err
    assert afina("predict", run, "--data", data, "--output", tmp_path / "out.csv").code == 0
    for row, a, b in zip(read(tmp_path / "out.csv")[:30], found["text"], found["text_pair"], strict=False):
        assert float(row["answer"]) == pytest.approx(float(a @ b), abs=1e-5)


def test_candidates_are_put_in_order(afina, base, tmp_path):
    some = texts(90)
    wrong = [json.dumps(pair) for pair in zip(some[60:], some[:30], strict=True)]
    rows = list(zip(some[:30], some[30:60], wrong, strict=True))
    data, run = write(tmp_path / "lists.csv", ["query", "passage", "negatives"], rows), tmp_path / "run"
    said = afina("train", "--data", data, "--model", base, "--output", run, *SMALL, "--task", "reranking")
    assert said.code == 0, said.err
    for part in ("nDCG@10", "shared words (BM25)", "With 95 % confidence recall@1"):
        assert part in said.out, part
    figures = json.loads(afina("evaluate", run, "--json").out)
    tested = json.loads((run / "metrics.json").read_text())["test"]
    assert figures["ndcg_at_10"] == pytest.approx(tested["ndcg_at_10"], abs=1e-6)
    one = json.loads(afina("predict", run, "--text", some[0], "--text-pair", some[30], "--json").out)
    asked = write(tmp_path / "asked.csv", ["query", "passage"], [(some[0], some[30]), (some[0], some[61])])
    assert afina("predict", run, "--data", asked, "--output", tmp_path / "out.csv").code == 0
    assert float(read(tmp_path / "out.csv")[0]["answer"]) == pytest.approx(one["score"], abs=1e-5)
    page = (run / "report.html").read_text()
    assert "a wrong one before" in page or "came before every wrong one" in page
    bare = write(tmp_path / "bare.csv", ["query", "passage"], [row[:2] for row in rows])
    said = afina("train", "--data", bare, "--model", base, "--output", tmp_path / "no", *SMALL, "--task", "reranking")
    assert said.code != 0
    assert "no wrong passage, so there is nothing to tell apart; name wrong passages with data.negatives" in said.err
    odd = write(tmp_path / "wrong.csv", ["query", "passage", "negatives"], [*rows, ("w1", "w2", "[3]")])
    said = afina("train", "--data", odd, "--model", base, "--output", tmp_path / "no", *SMALL, "--task", "reranking")
    assert "line 32: the negatives hold 3; expected a text or a list" in said.err


def test_what_has_no_vectors_says_so(afina, base, tmp_path):
    data = write(tmp_path / "rows.csv", ["text", "label"], [(t, "ab"["w1" in t]) for t in texts(40)])
    assert afina("train", "--data", data, "--model", base, "--output", tmp_path / "run", *SMALL, "--epochs", 1).code == 0
    said = afina("predict", tmp_path / "run", "--data", data, "--output", tmp_path / "out.npz")
    assert said.code != 0
    assert "sequence_classification answers with no vectors" in said.err
    assert not (tmp_path / "out.npz").exists()


def test_t28_classes_weigh_as_asked_in_the_loss_alone(base, tmp_path):
    """n / (k * count) of the training rows; the rows of the other sides stay as they are."""
    some = texts(60)
    labelled = [(t, "rare" if i % 5 == 0 else "usual") for i, t in enumerate(some)]
    data = write(tmp_path / "rows.csv", ["text", "label"], labelled)
    asked = {"file": str(data), "balance": "class_weights"}
    run = prepare(Recipe(model=str(base), data=DataOptions(**asked)), None, trial=True)
    counts = run.classes("train")
    rows = sum(counts.values())
    assert run.task.class_weights == pytest.approx([rows / (2 * counts[label]) for label in run.task.labels])
    batch = run.task.collate([run.rows["train"].features[i] for i in range(rows)])
    assert run.task.targets_in(batch) == pytest.approx(rows)  # weights are 1 on average
    assert sum(run.classes("test").values()) == 12
    numbers = write(tmp_path / "numbers.csv", ["text", "score"], [(t, i % 7) for i, t in enumerate(some)])
    recipe = Recipe(task={"name": "regression"}, model=str(base), data=DataOptions(**{**asked, "file": str(numbers)}))
    with pytest.raises(AfinaError, match="balance"):
        prepare(recipe, None, trial=True)
