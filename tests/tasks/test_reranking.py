"""Candidates of a query in order: losses by hand, figures by hand, and what a row may be."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tasks_made import answered, asked, check_parts_change_nothing, examples_of, made, reread, sentences, trained
from tiny_bases import save_bert

from afina.errors import DataError
from afina.tasks.reranking import Reranking
from afina.tasks.retrieval import figures_of

NAME = "reranking"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    return save_bert(tmp_path_factory.mktemp("reranking"))


def lists(count):
    """A query names a telling word, its passage holds it, and one to three others do not."""
    texts = sentences(5 * count)
    rows = []
    for i in range(count):
        passage, (word,) = texts[i]
        wrong = [text for text, (other,) in texts[count:] if other != word][3 * i : 3 * i + 1 + i % 3]
        rows.append({"text": f"w{i} {word}", "text_pair": passage, "negatives": json.dumps(wrong)})
    return rows


def singles(rows):
    """The same, a row a candidate."""
    found = []
    for row in rows:
        found.append({"text": row["text"], "text_pair": row["text_pair"], "label": "1"})
        found += [{"text": row["text"], "text_pair": text, "label": "0"} for text in json.loads(row["negatives"])]
    return found


@pytest.mark.parametrize("objective", ["pairwise", "pointwise"])
def test_t25_parts_change_neither_loss_nor_gradients(base, tmp_path, objective):
    check_parts_change_nothing(NAME, base, lists(13), tmp_path, objective=objective)


def test_the_losses_are_those_by_hand(base):
    for objective in ("auto", "pointwise"):
        task, model, rows = made(NAME, base, lists(7), objective=objective)
        assert task.pairwise == (objective == "auto")
        batch, found = task.collate(rows.features), answered(task, model, rows)
        losses = []
        for own in map(torch.from_numpy, found):
            if task.pairwise:
                losses.append(F.softplus(own[1:] - own[0]).mean())
            else:
                losses += [F.softplus(-own[0]), *F.softplus(own[1:])]
        torch.testing.assert_close(task.loss_sum(model.eval(), batch).double(), sum(losses), rtol=1e-4, atol=1e-4)
        assert task.targets_in(batch) == len(losses)
        assert task.metrics(found, rows.examples)["loss"] == pytest.approx(float(sum(losses)) / len(losses))


@pytest.mark.parametrize("form", [lists, lambda count: singles(lists(count))], ids=["lists", "singles"])
def test_rows_are_memorised(base, tmp_path, form):
    task, model, rows = made(NAME, base, form(17))
    before = task.metrics(answered(task, model, rows), rows.examples)
    trained(task, model, rows, tmp_path, epochs=25, batch_size=17)
    answers = answered(task, model, rows)
    after = task.metrics(answers, rows.examples)
    assert after["queries"] == 17
    assert after["mrr_at_10"] > max(0.9, before["mrr_at_10"])
    assert set(task.figures) <= set(after)
    again = reread(task, base)
    assert again.pairwise == task.pairwise == (form is lists)
    assert again.respond(answers[0], rows.examples[0]) == task.respond(answers[0], rows.examples[0])
    assert list(task.columns(answers[0], rows.examples[0])) == ["answer"]


def test_figures_are_those_of_each_list(base):
    """Both forms of a file say the same, a query over several rows too."""
    rows = lists(11)
    rows[4]["text"] = rows[3]["text"]
    task, model, encoded = made(NAME, base, rows)
    answers, places = answered(task, model, encoded), {}
    for row, own in zip(rows, answers, strict=True):
        right, wrong = places.setdefault(row["text"], ([], []))
        right.append(own[0])
        wrong += list(own[1:])
    expected = figures_of([
        np.array([1 + sum(w > r for w in wrong) + i for i, r in enumerate(sorted(right, reverse=True))])
        for right, wrong in places.values()
    ])  # fmt: skip
    found = task.metrics(answers, encoded.examples)
    assert found["queries"] == 10
    expected = {key: value for key, value in expected.items() if not key.endswith("_interval")}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    flat, _, others = made(NAME, base, singles(rows))
    again = flat.metrics(answered(flat, model, others), others.examples)
    assert {key: again[key] for key in expected} == pytest.approx(expected)
    said = task.tabled(answers, encoded.examples)
    assert [float(s["rank"]) for s in said if s["rank"]] == [
        1 + sum(w > own[0] for w in places[row["text"]][1]) for row, own in zip(rows, answers, strict=True)
    ]
    in_flat = flat.tabled(answered(flat, model, others), others.examples)
    assert sum(bool(s["rank"]) for s in in_flat) == 11
    assert task.baselines(encoded, encoded)["word_search"]["queries"] == 10


def test_queries_that_say_nothing_are_left_out_and_counted(base):
    rows = [*singles(lists(3)), {"text": "w30", "text_pair": "w31", "label": "1"},
            {"text": "w33", "text_pair": "w34", "label": "0"}]  # fmt: skip
    task, model, encoded = made(NAME, base, rows)
    found = task.metrics(answered(task, model, encoded), encoded.examples)
    assert (found["queries"], found["queries_left_out"]) == (3, 2)
    alone = examples_of(NAME, rows[-2:])
    assert task.metrics([np.array([0.1]), np.array([0.2])], alone)["ndcg_at_10"] is None


def test_a_candidate_is_read_by_itself(base, monkeypatch):
    task, model, rows = made(NAME, base, lists(5))
    together = asked(task, model, rows.features)
    monkeypatch.setattr("afina.tasks.reranking._READ", 2)
    for a, b in zip(asked(task, model, rows.features), together, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for row, own in zip(lists(5), together, strict=True):
        texts = [row["text_pair"], *json.loads(row["negatives"])]
        examples = examples_of(NAME, [{"text": row["text"], "text_pair": text} for text in texts])
        scores = asked(task, model, task.encode(examples, None, 61).features)
        assert np.concatenate(scores) == pytest.approx(own, abs=1e-5)


def test_a_right_passage_of_another_row_is_right(base):
    rows = [{"text": "w1", "text_pair": "w2", "negatives": '["w9", "w3"]'},
            {"text": "W1", "text_pair": "W3", "negatives": "w5"}]  # fmt: skip
    task, _, encoded = made(NAME, base, rows)
    assert [f["targets"] for f in encoded.features] == [[1, 0, 1], [1, 0]]
    assert "names a right passage" in task.encode(examples_of(NAME, rows), None, 61).notes[0]


def test_what_a_row_may_not_be(base):
    make = Reranking.kind.make
    with pytest.raises(ValueError, match="the label is '2'; expected 1 for a right passage and 0"):
        make({"text": "a", "text_pair": "b", "label": "2"}, 2)
    with pytest.raises(ValueError, match="labelled 0; give wrong passages rows of their own"):
        make({"text": "a", "text_pair": "b", "label": "0", "negatives": "c"}, 2)
    assert make({"text": "a", "text_pair": ""}, 2).text == make({"text": "", "text_pair": "b"}, 2).text == ""
    plain = [{"text": f"w{i}", "text_pair": "w9"} for i in range(3)]
    with pytest.raises(DataError, match=r"no wrong passage.*data\.negatives.*data\.label"):
        made(NAME, base, plain)
    with pytest.raises(DataError, match="no right passage"):
        made(NAME, base, [{**row, "label": "0"} for row in plain])
    with pytest.raises(DataError, match=r"task\.objective=pairwise: 1 rows have no wrong passage.*line 5.*pointwise"):
        made(NAME, base, [*lists(3), plain[0]], objective="pairwise")
    assert not made(NAME, base, [*lists(3), plain[0]])[0].pairwise


def test_t30_cut_rows_are_counted_once(base):
    long = " ".join(f"w{i}" for i in range(30))
    task, _, _ = made(NAME, base, lists(3))
    row = {"text": "w1", "text_pair": long, "negatives": json.dumps([long, "w2"])}
    encoded = task.encode(examples_of(NAME, [row, {**row, "text_pair": "w2", "negatives": "w3"}]), 9, 61)
    assert encoded.truncated == 1
    assert encoded.features[0]["ends"][:2] == [9, 18]
    assert len(encoded.features[0]["input_ids"]) == 9
