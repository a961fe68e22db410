"""Answers in a context: windows, offsets, questions without an answer, training."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from tasks_made import answered, check_parts_change_nothing, examples_of, made, reread, trained
from text_bases import bytelevel, save, wordpiece

from afina import PromptTuningConfig
from afina.core.files import read_weights
from afina.errors import ConfigError, DataError
from afina.tasks.question_answering import NO_ANSWER, QuestionAnswering
from afina.tasks.task import IGNORED, Rows
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun

NAMES = ["Ana", "Zoë", "Łukasz", "Nguyễn", "Iñaki", "Ørsted", "Jürgen", "Chloé"]
PLACES = ["Köln", "São Paulo", "León", "Århus", "Ñuñoa", "Kraków 🎉", "Besançon", "L'Aquila"]
KINDS = {"pieces of words": wordpiece, "bytes": bytelevel}


def paragraph(chance, facts=3):
    """People, where they live, and questions about them."""
    people, places = chance.sample(NAMES, facts), chance.sample(PLACES, facts)
    context = " ".join(f"{name} vive en {place}." for name, place in zip(people, places, strict=True))
    for name, place in zip(people, places, strict=True):
        start = context.index(place, context.index(name))
        yield {
            "text": f"¿Dónde vive {name}?", "text_pair": context,
            "label": json.dumps({"text": [place], "answer_start": [start]}),
        }  # fmt: skip


def rows_of(count, *, seed=0, facts=3):
    chance = random.Random(seed)
    return list(itertools.islice(itertools.chain.from_iterable(paragraph(chance, facts) for _ in range(count)), count))


TEXTS = [row[role] for row in rows_of(31) for role in ("text", "text_pair")]


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("qa") / "base", KINDS[request.param](TEXTS))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("encoder") / "base", wordpiece(TEXTS, size=80))


def perfect(task, rows):
    """Answers that are the targets: joined as those of a model."""
    answers = []
    for feature in rows.features:
        first, last = feature["labels"]
        inside = first >= feature["context"][0]
        answers.append((1.0 if inside else -9.0, first, last, 0.0, 1.0, None))
    return task.join(answers, rows)


# --- rows


def test_an_answer_is_where_the_row_says_or_where_it_occurs_once():
    make = QuestionAnswering.kind.make
    row = {"text": "¿Qué?", "text_pair": "\ufeffUn gato, otro gato y un perro.", "label": ""}
    for answer, start, place, moved in (
        ("gato", 4, 4, False),
        ("gato", 15, 15, False),
        ("perro", 25, 25, False),
        ("perro", 23, 25, True),
        ("perro", None, 25, True),
        (" perro", 24, 25, False),
    ):
        label = json.dumps([{"text": answer, "answer_start": start}])
        example = make({**row, "label": label}, 7)
        assert example.value.answers == ((answer.strip(), place),)
        assert example.value.moved == moved
        assert example.label == answer.strip()
    learned = QuestionAnswering.learn([example, make({**row, "label": "perro"}, 8)], [])
    assert learned == {"unanswerable": False, "moved": 1}


@pytest.mark.parametrize(
    ("answer", "start", "said"),
    [
        ("gato", 5, r"the answer 'gato' is not at character 5, where 'ato,' stands; it occurs 2 times"),
        ("gato", None, r"where the answer 'gato' begins is not said \(answer_start\), and it occurs 2 times"),
        ("pato", 4, r"not at character 4, where 'gato' stands; it does not occur"),
        ("gato", 99, r"where the context has ended \(31 characters\)"),
        ("gato", -1, r"is not at character -1"),
    ],
)
def test_an_answer_that_is_not_there_is_refused(answer, start, said):
    row = {"text": "¿Qué?", "text_pair": "\ufeffUn gato, otro gato y un perro.",
           "label": json.dumps({"text": [answer], "answer_start": [start]})}  # fmt: skip
    with pytest.raises(ValueError, match=said):
        QuestionAnswering.kind.make(row, 3)


def test_no_context_and_no_answers_at_all():
    with pytest.raises(ValueError, match="the context is empty"):
        QuestionAnswering.kind.make({"text": "¿Qué?", "text_pair": " "}, 3)
    example = QuestionAnswering.kind.make({"text": "q", "text_pair": "c", "label": "[]"}, 3)
    assert (example.label, example.value.answers) == (NO_ANSWER, ())
    with pytest.raises(DataError, match="no training question has an answer"):
        QuestionAnswering.learn([example], [])


def test_t27_questions_of_one_context_are_one_group():
    examples = examples_of("question_answering", rows_of(9))
    assert len({e.group for e in examples}) == 3
    for example in examples:
        assert [e.value.context for e in examples if e.group == example.group] == [example.value.context] * 3


# --- windows and offsets


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [None, 37])
def test_decoding_is_the_inverse_of_encoding(tmp_path, name, length):
    """Any words of any text come back as they stand there, through one window or many."""
    chance = random.Random(0)
    words = ["Ñandú", "l'été", "🎉🎉", "x\u0301", "中文", "e-mail", "3,5%", "«Zoë»", "ﬁn", "ẞ", "(a)", "İ"]
    rows = []
    for _ in range(61):
        chosen = chance.choices(words, k=chance.randrange(1, 23))
        gaps = chance.choices([" ", "  ", "\n", "\u00a0"], k=len(chosen))
        context = "".join(w + g for w, g in zip(chosen, gaps, strict=True))
        context = chance.choice(["", "\ufeff", " ", "\ufeff\ufeff"]) + context
        first = chance.randrange(len(chosen))
        last = min(len(chosen), first + chance.randrange(1, 3))
        lead = len(context) - sum(len(w + g) for w, g in zip(chosen, gaps, strict=True))
        start = lead + sum(len(w + g) for w, g in zip(chosen[:first], gaps[:first], strict=True))
        answer = context[start : start + sum(len(w + g) for w, g in zip(chosen[first:last], gaps[first:last], strict=True))]
        rows.append({"text": "¿Qué?", "text_pair": context, "label": json.dumps([{"text": answer, "answer_start": start}])})
    base = save(tmp_path / "base", KINDS[name](words * 3, size=290))
    task, _, _ = made("question_answering", base, rows[:3])
    examples = examples_of("question_answering", rows)
    encoded = task.encode(examples, length, 500)
    assert encoded.truncated == 0 or (length and encoded.truncated < 9)
    assert (len(encoded.features) > 61) == bool(length)
    found = perfect(task, Rows(examples, encoded.features))
    lost = {f["row"] for f in encoded.features if f["labels"] == [IGNORED, IGNORED]}
    assert len(lost) == encoded.truncated
    for i, (answer, example) in enumerate(zip(found, examples, strict=True)):
        if i not in lost:
            text, start = example.value.answers[0]
            assert (answer.text, answer.start, answer.end) == (text, start, start + len(text))


def test_windows_give_the_answer_of_one_large_window(encoder):
    """For a model whose scores depend on the token alone, cutting up the context changes nothing."""
    task, model, rows = made("question_answering", encoder, rows_of(17, facts=5), max_answer_tokens=7)
    model.eval()
    table = torch.randn(len(task.tokenizer), 2)

    class Alone(torch.nn.Module):
        def forward(self, input_ids, **_):
            class Out:
                start_logits, end_logits = table[input_ids].unbind(-1)

            return Out

    whole = answered(task, Alone(), rows)
    for length, stride in ((53, 8), (41, 17), (29, 7), (61, 30)):
        task.options.stride = stride
        encoded = task.encode(rows.examples, length, 127)
        assert len(encoded.features) > len(rows.features)
        assert max(encoded.lengths) <= length
        cut = answered(task, Alone(), Rows(rows.examples, encoded.features))
        assert [(a.text, a.start, a.end) for a in cut] == [(a.text, a.start, a.end) for a in whole]
    assert len({a.text for a in whole}) > 1


def test_neighbouring_windows_share_what_was_asked(encoder):
    task, _, rows = made("question_answering", encoder, rows_of(5, facts=7), stride=11)
    windows = [f for f in task.encode(rows.examples, 41, 127).features if f["row"] == 0]
    assert len(windows) > 2
    for before, after in itertools.pairwise(windows):
        assert before["offsets"][-22:] == after["offsets"][:22]
    assert task.encode(rows.examples, None, 127).max_length < 127  # no longer than the longest


def test_t30_answers_that_no_window_holds_are_counted_and_not_taught(encoder):
    long = "Zoë vive en " + " ".join(PLACES * 3) + "."
    answer = " ".join(PLACES * 2)
    row = {"text": "¿Dónde?", "text_pair": long, "label": json.dumps([{"text": answer, "answer_start": 12}])}
    task, model, rows = made("question_answering", encoder, [row, *rows_of(6)], stride=5)
    encoded = task.encode(rows.examples, 31, 127)
    assert encoded.truncated == 1
    own = [f for f in encoded.features if f["row"] == 0]
    assert len(own) > 2
    assert all(f["labels"] == [IGNORED, IGNORED] for f in own)
    batch = task.collate(encoded.features)
    assert task.targets_in(batch) == len(encoded.features) - len(own)
    assert task.loss_sum(model, task.collate(own)) == 0
    figures = task.metrics(answered(task, model, Rows(rows.examples, encoded.features)), rows.examples)
    assert figures["rows"] == 7
    task.options.max_answer_tokens = 2
    assert task.encode(rows.examples, None, 127).truncated > 1  # longer than any answer that can be given


@pytest.mark.parametrize(("stride", "said"), [(None, r"leaves \d for the context$"), (9, r"leaves \d .*task\.stride=9")])
def test_questions_that_leave_no_room_are_refused(encoder, stride, said):
    rows = rows_of(5)
    rows[3]["text"] = " ".join(NAMES * 3)
    task, _, made_rows = made("question_answering", encoder, rows, stride=stride)
    with pytest.raises(ConfigError, match=rf"windows of 24 tokens \(training\.max_length\) are too short: line 5 .* {said}"):
        task.encode(made_rows.examples, 24, 127)


def test_a_row_is_read_alike_whatever_other_rows_are_read_with_it(encoder):
    """Also where a long question leaves its windows less to share than others have."""
    rows = rows_of(7, facts=7)
    rows[2]["text"] = " ".join(NAMES[:5])
    task, _, made_rows = made("question_answering", encoder, rows)
    together = task.encode(made_rows.examples, 48, 127).features
    assert [f["row"] for f in together] == sorted(f["row"] for f in together)
    for i, example in enumerate(made_rows.examples):
        alone = task.encode([example], 48, 127).features
        assert [f["input_ids"] for f in alone] == [f["input_ids"] for f in together if f["row"] == i]
    own = task._strides(made_rows.examples, [len(task.tokenizer(r["text"])["input_ids"]) - 2 for r in rows], 48)
    assert len(set(own)) == 2


# --- loss and answers


def test_t25_parts_change_neither_loss_nor_gradients(base, tmp_path):
    check_parts_change_nothing("question_answering", base, rows_of(23), tmp_path)


def test_t25_parts_with_several_windows_a_row(encoder, tmp_path):
    check_parts_change_nothing("question_answering", encoder, rows_of(11, facts=7), tmp_path, stride=7)


def test_t23_padding_and_company_change_no_answer(base):
    task, model, rows = made("question_answering", base, rows_of(13, facts=4))
    rows.features[:] = task.encode(rows.examples, 53, 127).features
    model.eval()
    for f in rows.features:
        f["labels"] = f["labels"] if f["row"] % 3 else [IGNORED, IGNORED]
    with torch.no_grad():
        together = task.answers(model, task.collate(rows.features))
        alone = [task.answers(model, task.collate([f]))[0] for f in rows.features]
        mixed = task.collate(rows.features)
        parts = sum(task.loss_sum(model, task.collate([f])) for f in rows.features)
        torch.testing.assert_close(task.loss_sum(model, mixed), parts, rtol=1e-5, atol=1e-4)
    for one, other in zip(alone, together, strict=True):
        assert one[1:3] == other[1:3]
        assert one == pytest.approx(other, abs=1e-4)
    assert len({len(f["input_ids"]) for f in rows.features}) > 1


def test_only_the_context_and_the_token_of_no_answer_can_be_pointed_at(base):
    task, model, rows = made("question_answering", base, rows_of(7))
    batch = task.collate(rows.features)
    chances = task.outputs(model, batch)
    assert torch.allclose(chances.sum(-1), torch.ones(7, 2, dtype=torch.double))
    for i, feature in enumerate(rows.features):
        first, last = feature["context"]
        open_ = {feature["null"], *range(first, last)}
        assert all((chances[i, :, k] > 0).all() == (k in open_) for k in range(chances.shape[2]))
    task.label_smoothing = 0.1
    loss = task.loss_sum(model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_best_stretch_against_all_stretches(encoder):
    task, model, rows = made("question_answering", encoder, rows_of(7), max_answer_tokens=7)
    model.eval()
    batch = task.collate(rows.features)
    with torch.no_grad():
        logits = task.logits(model, batch).double()
    for i, (score, first, last, none, everything, loss) in enumerate(task.answers(model, batch)):
        low, high = rows.features[i]["context"]
        pairs = [(s, e) for s in range(low, high) for e in range(s, min(high, s + 7))]
        best = max(pairs, key=lambda p: float(logits[i, 0, p[0]] + logits[i, 1, p[1]]))
        assert (first, last) == best
        assert score == pytest.approx(float(logits[i, 0, first] + logits[i, 1, last]))
        assert none == pytest.approx(float(logits[i, :, 0].sum()))
        start, end = torch.softmax(logits[i], dim=-1)
        assert torch.tensor(score - everything).exp() == pytest.approx(float(start[first] * end[last]), rel=1e-4)
        target = rows.features[i]["labels"]
        if target[0] == IGNORED:
            assert loss is None
        else:
            assert loss == pytest.approx(-float(start[target[0]].log() + end[target[1]].log()) / 2)


def test_a_tiny_decoder_memorises(tmp_path):
    base = save(tmp_path / "base", bytelevel(TEXTS), hidden=32)
    task, model, rows = made("question_answering", base, rows_of(13), r=16)
    trained(task, model, rows, tmp_path / "run", epochs=25, evaluate_every=25.0)
    answers = answered(task, model, rows)
    figures = task.metrics(answers, rows.examples)
    assert figures["exact_match"] > 0.9
    assert figures["f1"] >= figures["exact_match"]
    assert figures["loss"] < 0.5
    again = reread(task, tmp_path / "base")
    assert again.settings() == task.settings()
    for answer, example in zip(answers, rows.examples, strict=True):
        assert example.value.context[answer.start : answer.end] == answer.text
        assert 0 < answer.probability <= 1
        assert json.loads(json.dumps(task.respond(answer, example)))["answer"] == answer.text


def test_t05_t27_a_run_memorises_its_rows(tmp_path):
    """From a file, through all that a run does: the new head comes back, and no context is on two sides."""
    base = save(tmp_path / "base", wordpiece(TEXTS), hidden=48, layers=3)
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows_of(45, seed=3):
            names = {"question": row["text"], "context": row["text_pair"], "answers": json.loads(row["label"])}
            file.write(json.dumps(names) + "\n")
    options = {"epochs": 30, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "evaluate_every": 30.0}
    recipe = Recipe(
        task={"name": "question_answering"}, model=str(base), data=DataOptions(file=str(tmp_path / "rows.jsonl")),
        method={"name": "lora", "r": 16, "target_modules": "all-linear"}, training=TrainingOptions(**options),
    )  # fmt: skip
    run = prepare(recipe, tmp_path / "run")
    run.execute()
    sides = {name: {e.value.context for e in rows.examples} for name, rows in run.rows.items()}
    assert len(run.rows["train"].examples) >= 30
    assert sum(map(len, sides.values())) == len(set.union(*sides.values())) == 15
    assert any("qa_outputs" in key for key in read_weights(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    again = TrainedRun.load(tmp_path / "run")
    figures = again.task.metrics(again.answers(run.rows["train"].examples), run.rows["train"].examples)
    assert figures["exact_match"] > 0.9


def test_questions_without_an_answer(encoder, tmp_path):
    rows = rows_of(30)
    for row in rows[::3]:
        row["label"] = "[]"
        row["text"] = "¿Cuándo nació " + row["text"].removeprefix("¿Dónde vive ")
    task, model, encoded = made("question_answering", encoder, rows, r=8)
    assert task.learned["unanswerable"]
    untrained = task.metrics(answered(task, model, encoded), encoded.examples)
    trained(task, model, encoded, tmp_path, epochs=20, evaluate_every=20.0)
    answers = answered(task, model, encoded)
    figures = task.metrics(answers, encoded.examples)
    assert figures["without_answer"]["rows"] == 10
    assert figures["without_answer"]["exact_match"] > 0.8
    assert figures["f1"] > untrained["f1"]
    none = next(a for a, e in zip(answers, encoded.examples, strict=True) if not a.text and not e.value.answers)
    said = task.respond(none, encoded.examples[0])
    assert said["answer"] is None
    assert said["probability"] == said["no_answer_probability"] > 0.3
    assert task.columns(none, encoded.examples[0])["answer"] == NO_ANSWER
    assert task.baselines(encoded, encoded)["no_answer"]["exact_match"] == pytest.approx(1 / 3)
    task.unanswerable = False
    assert all(a.text for a in answered(task, model, encoded))


def test_no_answer_must_be_said_by_every_window(encoder):
    task, _, rows = made("question_answering", encoder, rows_of(4, facts=7))
    task.unanswerable = True
    features = [f for f in task.encode(rows.examples, 41, 127).features if f["row"] == 0]
    rows = Rows(rows.examples[:1], features)
    first = features[0]["context"][0]
    for nulls, scores, found in (((3.0, 9.0), (5.0, 1.0), 5.0), ((6.0, 9.0), (5.0, 1.0), None), ((6.0, 0.5), (0, 1.0), 1.0)):
        answers = [(scores[min(i, 1)], first, first, nulls[min(i, 1)], 10.0, None) for i in range(len(features))]
        (answer,) = task.join(answers, rows)
        assert bool(answer.text) == (found is not None)


def test_baseline_and_figures(encoder):
    task, _, rows = made("question_answering", encoder, rows_of(23), language="es")
    found = task.baselines(rows, rows)
    assert set(found) == {"overlap"}
    assert 0.1 < found["overlap"]["f1"] < 1
    assert found["overlap"]["language"] == "es"
    assert set(task.figures) <= set(found["overlap"])


def test_virtual_tokens_are_not_pointed_at(encoder, tmp_path):
    method = PromptTuningConfig(num_virtual_tokens=3, task_type="QUESTION_ANS")
    task, model, rows = made("question_answering", encoder, rows_of(7), method=method)
    batch = task.collate(rows.features)
    assert task.logits(model, batch).shape == (7, 2, batch["input_ids"].shape[1])
    trained(task, model, rows, tmp_path, epochs=1)
