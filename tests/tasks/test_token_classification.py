"""Tags of words: from files to entities."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tasks_made import answered, check_parts_change_nothing, examples_of, made, reread, trained
from text_bases import bytelevel, save, wordpiece

from afina import PromptTuningConfig
from afina.errors import ConfigError, DataError
from afina.tasks.token_classification import TokenClassification
from afina.tasks.words import first_pieces, joined, split_words

SHARED = Path(__file__).parents[3] / "shared" / "data"
FIRST, LAST = ["Ana", "Zoë", "Łukasz", "Nguyễn"], ["Pérez", "O'Neil", "Müller-Lüdenscheidt"]
PLACES = [["Köln"], ["São", "Paulo"], ["New", "York", "City"]]
OTHERS = ["der", "the", "in", "lives", "with", "and", "went", "to", ".", ",", "!", "🎉", "yesterday", "1999", "@zoë"]


def sentence(chance):
    words, tags = [], []
    for _ in range(chance.randrange(1, 5)):
        for word in chance.choices(OTHERS, k=chance.randrange(1, 5)):
            words.append(word)
            tags.append("O")
        found = [chance.choice(FIRST), chance.choice(LAST)] if chance.random() < 0.5 else chance.choice(PLACES)
        kind = "person" if found[0] in FIRST else "place"
        words += found
        tags += [f"B-{kind}", *[f"I-{kind}"] * (len(found) - 1)]
    return words, tags


def sentences(count, seed=0):
    chance, made = random.Random(seed), {}
    while len(made) < count:
        words, tags = sentence(chance)
        made[" ".join(words)] = (words, tags)
    return list(made.values())


def rows_of(count, seed=0):
    return [{"text": json.dumps(w, ensure_ascii=False), "label": json.dumps(t)} for w, t in sentences(count, seed)]


TEXTS = [" ".join(words) for words, _ in sentences(97)]
TOKENIZERS = {"pieces of words": wordpiece, "bytes": bytelevel}


@pytest.fixture(scope="module", params=TOKENIZERS)
def base(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("ner") / "base", TOKENIZERS[request.param](TEXTS))


# --- words and pieces


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_find_their_words(name):
    """Every word has one first piece, and the letters from there to the next are the word's."""
    tokenizer = TOKENIZERS[name](TEXTS, size=270)
    for words, _ in sentences(31, seed=5):
        text, spans = joined(words)
        encoded = tokenizer(text, return_offsets_mapping=True)
        found = first_pieces(text, spans, encoded["offset_mapping"])
        assert [word for word in found if word >= 0] == list(range(len(words)))
        for piece, word in enumerate(found):
            if word >= 0:
                start = encoded["offset_mapping"][piece][0]
                assert text[start : spans[word][1]].strip() == words[word]


@pytest.mark.parametrize("name", ["bert_uncased_hf", "gpt2_hf"])
@pytest.mark.skipif(not (SHARED / "tokenizers").is_dir(), reason="../shared/data/tokenizers is absent")
def test_pieces_are_those_of_the_tokenizers_own_word_ids(name):
    from transformers import AutoTokenizer

    folder = SHARED / "tokenizers" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lists = AutoTokenizer.from_pretrained(folder, **({"add_prefix_space": True} if "gpt2" in name else {}))
    for words, _ in sentences(53, seed=5):
        whole = lists(words, is_split_into_words=True)
        ids = whole.word_ids()
        want = [w if w is not None and w not in ids[:i] else -1 for i, w in enumerate(ids)]
        text, spans = joined(words)
        encoded = tokenizer(text, return_offsets_mapping=True)
        if len(encoded["input_ids"]) == len(want):  # the first word of a text has no space in front and may split otherwise
            assert first_pieces(text, spans, encoded["offset_mapping"]) == want
        else:
            assert sum(w >= 0 for w in first_pieces(text, spans, encoded["offset_mapping"])) == len(words)


def test_plain_text_is_split_into_words_and_signs():
    for text, words in (
        ("Ana's in Köln, today!", ["Ana", "'", "s", "in", "Köln", ",", "today", "!"]),
        ("@ana #1: https://a.b/c?d e", ["@ana", "#1", ":", "https://a.b/c?d", "e"]),
        ("cafe\u0301 हिन्दी 🎉", ["cafe\u0301", "हिन्दी", "🎉"]),
        ("  \n", []),
    ):
        assert [text[a:b] for a, b in split_words(text)] == words


# --- rows


def test_rows_are_lists_or_split_at_white_space():
    make = TokenClassification.kind.make
    as_lists = make({"text": '["New York", "is"]', "label": '["B-x", "O"]'}, 1)
    assert as_lists.value.words == ("New York", "is")
    assert make({"text": "Paris is", "label": "B-x O"}, 1).value.tags == ("B-x", "O")
    assert make({"text": '["a", "b"]', "label": "[0, 3]"}, 1).value.tags == ("0", "3")
    plain = make({"text": "Ana, you!"}, 1)
    assert (plain.label, plain.value.words) == ("", ("Ana", ",", "you", "!"))
    assert [plain.text[a:b] for a, b in plain.value.spans] == list(plain.value.words)
    assert make({"text": "[see] above"}, 1).value.words == ("[", "see", "]", "above")


@pytest.mark.parametrize(
    ("text", "label", "said"),
    [
        ('["a", "b"]', '["O"]', "2 words and 1 tags"),
        ("a b c", "O O", "3 words and 2 tags"),
        ("['a', 'b']", "O O", "is no JSON list of words"),
        ('["a", ""]', '["O", "O"]', "word 2 is empty"),
        ('["a", "b"]', '["O", " "]', "tag 2 is empty"),
        ('["a"]', '["B x"]', "holds white space"),
        ('["a", ["b"]]', '["O", "O"]', r'\["b"\] is in a list'),
        ('["a", null]', '["O", "O"]', "null is in a list"),
    ],
)
def test_rows_that_are_something_else(text, label, said):
    with pytest.raises(ValueError, match=said):
        TokenClassification.kind.make({"text": text, "label": label}, 3)


def test_t29_tags_that_differ_in_case_alone_are_refused():
    rows = [{"text": "Ana went", "label": "B-Person O"}, {"text": "Zoë went", "label": "B-person O"}]
    with pytest.raises(DataError, match=r"'B-Person' \(1 words\) and 'B-person' \(1 words\)"):
        TokenClassification.learn(examples_of("token_classification", rows), [])
    with pytest.raises(DataError, match="every word has the tag 'O'"):
        TokenClassification.learn(examples_of("token_classification", [{"text": "a b", "label": "O O"}]), [])


def test_the_scheme_is_said_and_broken_texts_are_counted(base):
    rows = [*rows_of(11), {"text": "in Köln", "label": "O I-place"}, {"text": "Ana Köln", "label": "B-person I-place"}]
    task, _, encoded = made("token_classification", base, rows)
    assert task.learned["labels"][0] == "O"
    notes = task.encode(encoded.examples, None, 127).notes
    assert notes[0] == "tags: IOB2"
    assert notes[1].startswith("2 texts have tags that break IOB2")


def test_numbers_for_tags_are_warned_of(base):
    rows = [{"text": "Ana went to Köln", "label": "[1, 0, 0, 2]"}] * 2
    task, _, encoded = made("token_classification", base, rows)
    assert "tags are numbers" in task.encode(encoded.examples, None, 127).notes[1]


# --- training and answers


def test_t25_parts_change_neither_loss_nor_gradients(base, tmp_path):
    check_parts_change_nothing("token_classification", base, rows_of(23), tmp_path)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tiny_model_memorises_32_rows(tmp_path, name):
    task, model, rows = made("token_classification", save(tmp_path / "base", TOKENIZERS[name](TEXTS)), rows_of(32))
    trained(task, model, rows, tmp_path / "run", epochs=25, evaluate_every=25.0)
    answers = answered(task, model, rows)
    figures = task.metrics(answers, rows.examples)
    assert figures["f1"] > 0.97
    assert set(figures) >= {"rows", "loss", *task.figures}
    assert figures["per_type"].keys() == {"person", "place"}
    right = [task.right(a, e) for a, e in zip(answers, rows.examples, strict=True)]
    assert sum(right) >= 29
    again = reread(task, tmp_path / "base")
    assert again.labels == task.labels
    assert again.scheme.name == "IOB2"


def test_t23_padding_and_company_change_no_answer(base):
    """Alone or in a batch, whatever side the tokenizer pads on."""
    task, model, rows = made("token_classification", base, rows_of(13))
    model.eval()
    answers = {}
    for side in ("left", "right"):
        task.tokenizer.padding_side = side
        answers[side] = answered(task, model, rows)
    alone = [task.answers(model, task.collate([f]))[0] for f in rows.features]
    for one, left, right in zip(alone, answers["left"], answers["right"], strict=True):
        assert one[0] == left.read == right.read
        np.testing.assert_allclose(left.probabilities, one[1], atol=1e-5)
        np.testing.assert_allclose(right.probabilities, one[1], atol=1e-5)
    mixed = task.collate(rows.features)
    total = task.loss_sum(model, mixed)
    parts = sum(task.loss_sum(model, task.collate([f])) for f in rows.features)
    torch.testing.assert_close(total, parts, rtol=1e-5, atol=1e-4)
    assert task.targets_in(mixed) == sum(len(e.value.words) for e in rows.examples)


def test_t30_words_cut_off_are_counted_and_count_as_missed(base):
    task, model, rows = made("token_classification", base, rows_of(13))
    whole = task.encode(rows.examples, None, 127)
    assert whole.truncated == 0
    short = task.encode(rows.examples, 11, 127)
    assert short.truncated == sum(len(f["input_ids"]) > 11 for f in whole.features) > 5
    assert max(len(f["input_ids"]) for f in short.features) == 11
    rows.features[:] = short.features
    answers = answered(task, model, rows)
    figures = task.metrics(answers, rows.examples)
    words = sum(len(e.value.words) for e in rows.examples)
    assert figures["words"] == words
    assert figures["missed_words"] == words - sum(word >= 0 for f in short.features for word in f["words"]) > 20
    assert figures["entities"] == sum(tag.startswith("B-") for e in rows.examples for tag in e.value.tags)
    for answer, example in zip(answers, rows.examples, strict=True):
        assert len(answer.tags) == len(example.value.words)
        assert {answer.tags[i] for i in set(range(len(answer.tags))) - set(answer.read)} <= {"O"}


def test_answers_keep_the_scheme(base):
    """Before training, when a model says anything."""
    task, model, rows = made("token_classification", base, rows_of(29))
    raw = [[task.labels[i] for i in a.probabilities.argmax(axis=1)] for a in answered(task, model, rows)]
    assert any(task.scheme.illegal(tags) for tags in raw)
    assert not any(task.scheme.illegal(a.tags) for a in answered(task, model, rows))


def test_entities_are_cut_out_of_the_text_as_it_stands(base):
    task, model, _ = made("token_classification", base, rows_of(13))
    text = "¡Zoë  Pérez, in\tKöln!"
    (example,) = examples_of("token_classification", [{"text": text}])
    feature = task.encode([example], None, 127).features[0]
    assert "labels" not in feature
    number = {label: i for i, label in enumerate(task.labels)}
    want = ["O", "B-person", "I-person", "O", "O", "B-place", "O"]
    p = np.full((len(want), len(number)), 0.02, dtype=np.float32)
    for i, tag in enumerate(want):
        p[i, number[tag]] = 0.9 - i / 100
    answer = task._tagged(example, list(range(len(want))), p)
    said = task.respond(answer, example)
    assert [text[e["start"] : e["end"]] for e in said["entities"]] == ["Zoë  Pérez", "Köln"]
    assert [e["text"] for e in said["entities"]] == ["Zoë  Pérez", "Köln"]
    assert [e["probability"] for e in said["entities"]] == pytest.approx([0.88, 0.85])
    assert json.loads(json.dumps(said))["tags"] == want
    assert task.columns(answer, example)["answer"] == "Zoë  Pérez (person, 0.880); Köln (place, 0.850)"
    assert len(task.answers(model, task.collate([feature]))[0][0]) == len(want)


def test_baselines(base):
    train, test = rows_of(41), rows_of(17, seed=9)
    task, _, rows = made("token_classification", base, [*train, *test])
    sides = [type(rows)(part, []) for part in (rows.examples[:41], rows.examples[41:])]
    found = task.baselines(*sides)
    assert found["majority"]["f1"] == 0
    assert found["majority"]["accuracy"] == pytest.approx(
        np.mean([tag == "O" for e in sides[1].examples for tag in e.value.tags])
    )
    assert found["seen_words"]["f1"] > 0.9  # every word was seen, under one tag
    assert found["seen_words"]["loss"] < found["majority"]["loss"]


def test_class_weights_weigh_loss_and_targets_alike(base):
    task, model, rows = made("token_classification", base, rows_of(5))
    batch = task.collate(rows.features)
    plain, targets = task.loss_sum(model, batch), task.targets_in(batch)
    task.class_weights = [3.0] * len(task.labels)
    torch.testing.assert_close(task.loss_sum(model, batch), 3 * plain)
    assert task.targets_in(batch) == 3 * targets


def test_virtual_tokens_are_not_answered(base, tmp_path):
    method = PromptTuningConfig(num_virtual_tokens=3, task_type="TOKEN_CLS")
    task, model, rows = made("token_classification", base, rows_of(7), method=method)
    batch = task.collate(rows.features)
    assert task.logits(model, batch).shape[:2] == batch["input_ids"].shape
    trained(task, model, rows, tmp_path, epochs=1)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast, pad_token = False, "x"

    with pytest.raises(ConfigError, match=r"Slow cannot say .* fast one"):
        TokenClassification(Slow())
