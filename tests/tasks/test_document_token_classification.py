"""Tags of words on pages: boxes in, windows, what cannot be, and that places are read."""

from __future__ import annotations

import json
import random

import document_bases
import numpy as np
import pytest
import torch
from document_bases import KINDS, SIZE, form, save_base
from tasks_made import answered, trained
from text_bases import bytelevel, wordpiece

from afina import LastLayersConfig, LoraConfig, PromptTuningConfig, get_peft_model
from afina.data.boxes import read_boxes, read_size
from afina.data.example import Example
from afina.errors import ConfigError, DataError
from afina.tasks.catalogue import task_from_settings
from afina.tasks.document_token_classification import DocumentTokenClassification, Page
from afina.tasks.task import IGNORED, Rows
from afina.tasks.words import first_pieces, joined
from afina.training.fast_path import fast_path
from afina.training.loop import make_engine
from afina.training.models import ModelSource, load_processor
from afina.training.recipe import TrainingOptions

SIZED = json.dumps(SIZE)


def rows_of(count, seed=0, fields=5):
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        words, boxes, tags = form(chance, fields)
        lists = {"text": words, "boxes": boxes, "label": tags, "page_size": SIZE}
        rows.append({role: json.dumps(values) for role, values in lists.items()})
    return rows


def made(base, rows, **options):
    """Task and examples on a base."""
    options = DocumentTokenClassification.Options(**{"boxes": "pixels", **options})
    kind = DocumentTokenClassification.kind_for(vars(options))
    examples = [kind.make(row, line) for line, row in enumerate(rows, 2)]
    source = ModelSource(str(base), str(base), str(base))
    return DocumentTokenClassification(load_processor(source, "document"), options, _learned(examples)), examples


def _learned(examples):
    return DocumentTokenClassification.learn(examples, [])


def adapted(task, base):
    model = task.load_model(str(base))
    config = LoraConfig(r=5, target_modules="all-linear", exclude_modules=task.idle(model), task_type="TOKEN_CLS")
    config.modules_to_save = ["word_embeddings", "x_position_embeddings", "y_position_embeddings"]  # random
    return get_peft_model(model, config)


# --- boxes


def test_boxes_are_thousandths_of_the_page():
    chance = random.Random(0)
    for _ in range(53):
        width, height = chance.randrange(40, 3000), chance.randrange(40, 3000)
        x, y = sorted(chance.choices(range(width + 1), k=2)), sorted(chance.choices(range(height + 1), k=2))
        box = [x[0], y[0], x[1], y[1]]
        ((found,), cut) = read_boxes(json.dumps([box]), ["w"], "pixels", (width, height))
        assert cut == 0
        for value, side, there in zip(box, (width, height) * 2, found, strict=True):
            assert 0 <= 1000 * value / side - there < 1
        assert read_boxes(json.dumps([list(found)]), ["w"], "thousandths", None)[0] == [found]
    assert read_size("[762, 1000]") == read_size("762 x 1000") == (762, 1000)


@pytest.mark.parametrize(("boxes", "unit", "size", "told"), [
    ("[[0, 0, 5, 5]]", "pixels", (9, 9), "2 words and 1 boxes"),
    ("[[0, 0, 5, 5], [3, 0, 1, 5]]", "pixels", (9, 9), r"word 2 \('b'\) has \[3, 0, 1, 5\], which ends left of"),
    ("[[0, 6, 5, 5], [3, 0, 4]]", "pixels", (9, 9), r"ends above where it begins, word 2 .* which is no \[x0, y0, x1, y1\]"),
    ("[[0, 0, 5, 5], [3, 0, 1001, 5]]", "thousandths", None, r"page of 1000 x 1000.*task.boxes=pixels.*task.clip"),
    ("[[0, 0, 50, 5], [-1, 0, 1, 5]]", "pixels", (9, 9), r"2 boxes lie outside the page of 9 x 9 pixels.*=thousandths"),
    ("[[0, 0, 5, 5], [3, 0, 4, null]]", "pixels", (9, 9), "which is no"),
    ("[[0, 0, 5, 5], [3, 0, 4, 5]]", "pixels", None, "nothing says how large the page is"),
    ('{"a": 1}', "pixels", (9, 9), "expected a list"),
])  # fmt: skip
def test_boxes_that_cannot_be_are_named(boxes, unit, size, told):
    with pytest.raises(ValueError, match=told):
        read_boxes(boxes, ["a", "b"], unit, size)


def test_boxes_are_cut_where_that_is_asked_for():
    found, cut = read_boxes("[[-3, 0, 5, 12], [1, 1, 2, 2]]", ["a", "b"], "pixels", (10, 10), clip=True)
    assert found == [(0, 0, 500, 1000), (100, 100, 200, 200)]
    assert cut == 1


@pytest.mark.parametrize(("changed", "told"), [
    ({"label": '["O"]'}, "words and 1 tags"),
    ({"boxes": ""}, "has no boxes"),
    ({"page_size": "[3]"}, r"expected \[width, height\]"),
    ({"page_size": ""}, "nothing says how large"),
])  # fmt: skip
def test_rows_that_cannot_be(changed, told):
    make = DocumentTokenClassification.kind_for({"boxes": "pixels"}).make
    with pytest.raises(ValueError, match=told):
        make({**rows_of(1)[0], **changed}, 2)


def test_the_picture_and_the_said_size_must_agree(tmp_path):
    words, boxes, _ = form(random.Random(1))
    document_bases.drawn(words, boxes).save(tmp_path / "page.png")
    row = {"text": json.dumps(words), "boxes": json.dumps(boxes), "image": str(tmp_path / "page.png")}
    make = DocumentTokenClassification.kind_for({"boxes": "pixels"}).make
    assert make(row, 2).value.boxes == make({**row, "page_size": SIZED}, 2).value.boxes
    with pytest.raises(ValueError, match="has 203 x 307"):
        make({**row, "page_size": "[762, 1000]"}, 2)


@pytest.mark.parametrize(("unit", "size", "told"), [
    ("thousandths", SIZE, True), ("pixels", (2480, 3508), True), ("pixels", SIZE, False),
])  # fmt: skip
def test_boxes_that_fill_a_corner_alone_are_asked_about(bases, unit, size, told):
    """What is said wrongly of boxes often contradicts nothing in a row."""
    task, examples = made(bases["layoutlm"], [{**row, "page_size": json.dumps(size)} for row in rows_of(7)], boxes=unit)
    notes = task.encode(examples, None, 66).notes
    assert any(f"are they {unit}?" in note for note in notes) == told


# --- pieces and windows


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: save_base(tmp_path_factory.mktemp("documents") / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_has_the_box_of_its_word(bases, kind):
    task, examples = made(bases[kind], rows_of(7), pictures=False)
    task.load_model(str(bases[kind]))
    batch = task.collate(task.encode(examples, None, 66).features)
    last = 1000 if kind == "layoutlm" else 0
    for i, example in enumerate(examples):
        count = len(example.value.words)
        boxes = batch["bbox"][i].tolist()
        assert boxes[0] == [0] * 4
        assert boxes[1 : count + 1] == [list(box) for box in example.value.boxes]
        assert boxes[count + 1] == [last] * 4
        assert not batch["bbox"][i, count + 2 :].any()


@pytest.mark.parametrize("name", ["pieces of words", "bytes"])
def test_words_of_several_pieces_and_with_spaces(bases, name):
    """As the reader of text finds them, and every letter of a word lies in a piece with its box."""
    task, _ = made(bases["lilt"], rows_of(3))
    words = ["Total", "due:", "TAN WOON YANN", "12.50", "Zoë", "Müller-Lüdenscheidt"]
    text, spans = joined(words)
    tokenizer = {"pieces of words": wordpiece, "bytes": bytelevel}[name]([text] * 3, size=270)
    task.tokenizer = tokenizer
    task.learned["labels"] = ["O", "B"]
    boxes = tuple((i, i, i + 1, i + 1) for i in range(1, len(words) + 1))
    page = Page(tuple(words), tuple(spans), ("O",) * 6, boxes)
    (feature,) = task.encode([Example(text, "O", 1, page)], None, 500).features
    told = tokenizer(text, return_offsets_mapping=True)
    assert feature["input_ids"] == told["input_ids"]
    assert feature["words"] == first_pieces(text, spans, told["offset_mapping"])
    for place, (a, b) in enumerate(told["offset_mapping"]):
        inside = [i for i, (start, end) in enumerate(spans) if a < end and b > start]
        if inside:
            assert tuple(feature["boxes"][4 * place : 4 * place + 4]) == boxes[inside[0]], place


@pytest.mark.parametrize(("length", "stride"), [(9, None), (13, 0), (23, 7), (66, None), (8, 5)])
def test_t30_no_word_of_a_long_page_is_lost_or_learned_twice(bases, length, stride):
    task, examples = made(bases["layoutlm"], rows_of(5, fields=9), stride=stride)
    encoded = task.encode(examples, length, 66)
    assert encoded.truncated == 0
    for i, example in enumerate(examples):
        own = [f for f in encoded.features if f["row"] == i]
        words = [word for f in own for word in f["words"] if word >= 0]
        assert words == list(range(len(example.value.words)))
        learned = [tag for f in own for tag in f["labels"] if tag != IGNORED]
        assert [task.labels[tag] for tag in learned] == list(example.value.tags)
        assert all(len(f["input_ids"]) <= length for f in own)
        edges = [f["words"].index(max(f["words"])) for f in own[:-1]]  # a word is read with what follows it
        assert all(edge < len(f["words"]) - 1 for edge, f in zip(edges, own, strict=False))
    assert any("windows" in note for note in encoded.notes) == (length < 40)


def test_answers_of_windows_become_one_page(bases):
    task, examples = made(bases["layoutlm"], rows_of(4, fields=9))
    features = task.encode(examples, 17, 66).features
    one = np.eye(len(task.labels))
    told = [
        ([w for w in f["words"] if w >= 0], np.stack([one[t] for t in f["labels"] if t != IGNORED]))
        if max(f["words"]) >= 0 else ([], np.zeros((0, len(task.labels))))
        for f in features
    ]  # fmt: skip
    answers = task.join(told, Rows(examples, features))
    assert [tuple(a.tags) for a in answers] == [e.value.tags for e in examples]
    metrics = task.metrics(answers, examples)
    assert (metrics["f1"], metrics["missed_words"]) == (1.0, 0)
    entity = task.respond(answers[0], examples[0])["entities"][0]
    assert len(entity["box"]) == 4


def test_windows_too_short_for_what_they_share(bases):
    task, examples = made(bases["layoutlm"], rows_of(3), stride=9)
    with pytest.raises(ConfigError, match=r"room for 5 pieces \(training.max_length\) and task.stride=9"):
        task.encode(examples, 7, 66)


# --- models


def shuffled(examples, seed=0):
    """The same pages, the boxes of each dealt anew among its words."""
    chance, found = random.Random(seed), []
    for example in examples:
        boxes = list(example.value.boxes)
        chance.shuffle(boxes)
        found.append(Example(example.text, example.label, example.line, _with(example.value, boxes)))
    return found


def _with(page, boxes):
    return Page(page.words, page.spans, page.tags, tuple(boxes), page.picture)


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_read(tmp_path, kind):
    """Tags follow from places alone: learned from boxes, and lost where each word has another's."""
    base = save_base(tmp_path / "base", kind, width=36)
    task, examples = made(base, rows_of(41), pictures=False)
    torch.manual_seed(0)
    model = adapted(task, base)
    rows = Rows(examples, task.encode(examples, None, 66).features)
    trained(task, model, rows, tmp_path / "run", epochs=12, learning_rate=2e-2)
    right = task.metrics(answered(task, model, rows), examples)
    dealt = shuffled(examples)
    wrong = task.metrics(answered(task, model, Rows(dealt, task.encode(dealt, None, 66).features)), dealt)
    assert right["accuracy"] > 0.9
    assert wrong["accuracy"] < 0.6
    assert wrong["f1"] < 0.5 * right["f1"]


def rows_with_pictures(count, folder):
    rows = rows_of(count)
    for n, row in enumerate(rows):
        row["image"] = str(folder / f"{n}.png")
        document_bases.drawn(json.loads(row["text"]), json.loads(row["boxes"])).save(row["image"])
    return rows


def test_layoutlmv3_looks_at_the_page(bases, tmp_path):
    task, examples = made(bases["layoutlmv3"], rows_with_pictures(3, tmp_path))
    assert task.reads_files
    model = task.load_model(str(bases["layoutlmv3"])).eval()
    batch = task.collate([task.ready(f) for f in task.encode(examples, None, 66).features])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    with torch.no_grad():
        seen = task.logits(model, batch)
        unseen = task.logits(model, {k: v for k, v in batch.items() if k != "pixel_values"})
    assert seen.shape[:2] == batch["input_ids"].shape
    assert (seen - unseen).abs().max() > 1e-4
    task, examples = made(bases["layoutlmv3"], rows_of(3))
    with pytest.raises(DataError, match=r"3 of 3 pages \(line 2, 3, 4\) name no picture.*task.pictures=false"):
        task.encode(examples, None, 66)


@pytest.mark.parametrize("kind", KINDS)
def test_t35_what_nothing_depends_on_is_not_adapted(bases, kind):
    """Every adapted weight moves the output, and what is left out does not."""
    task, examples = made(bases[kind], rows_of(5), pictures=False)
    model = task.load_model(str(bases[kind])).eval()
    batch = task.collate(task.encode(examples, None, 66).features)
    idle = set(task.idle(model))
    assert idle
    task.loss_sum(model, batch).backward()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            moved = module.weight.grad is not None and bool(module.weight.grad.any())
            assert moved == (name not in idle), name


@pytest.mark.parametrize("kind", ["layoutlm", "lilt"])
def test_virtual_tokens_stand_in_the_corner_of_the_page(bases, kind):
    task, examples = made(bases[kind], rows_of(3), pictures=False)
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="TOKEN_CLS")
    model = get_peft_model(task.load_model(str(bases[kind])), config).eval()
    batch = task.collate(task.encode(examples, None, 61).features)
    with torch.no_grad():
        found = task.logits(model, batch)
        embedded = model.get_base_model().get_input_embeddings()(batch["input_ids"])
        front = model.prompt_encoder["default"].output().expand(len(embedded), -1, -1)
        pad = torch.nn.functional.pad
        with model.disable_adapter():
            expected = model.get_base_model()(
                inputs_embeds=torch.cat([front, embedded], dim=1), bbox=pad(batch["bbox"], (0, 0, 5, 0)),
                attention_mask=pad(batch["attention_mask"], (5, 0), value=1),
            ).logits[:, 5:]  # fmt: skip
    assert found.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(found, expected)


def test_virtual_tokens_are_refused_where_the_model_takes_none(bases):
    task, _ = made(bases["layoutlmv3"], rows_of(3))
    config = PromptTuningConfig(num_virtual_tokens=5, task_type="TOKEN_CLS")
    model = get_peft_model(task.load_model(str(bases["layoutlmv3"])), config)
    with pytest.raises(ConfigError, match=r"method.name: LayoutLMv3.*takes no virtual tokens.*lora"):
        task.paths(model)


@pytest.mark.parametrize(("kind", "pictures", "kept"), [
    ("layoutlm", True, True), ("layoutlmv3", False, True), ("layoutlmv3", True, False), ("lilt", True, False),
])  # fmt: skip
def test_t35_frozen_blocks_computed_once_change_nothing(bases, tmp_path, monkeypatch, kind, pictures, kept):
    """And those that give other than one state a token are computed in every step."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    losses = {}
    for cache in ("1GB", "off"):
        task, examples = made(bases[kind], rows_with_pictures(11, tmp_path), pictures=pictures)
        torch.manual_seed(0)
        model = get_peft_model(task.load_model(str(bases[kind])), LastLayersConfig(num_layers=1, task_type="TOKEN_CLS"))
        rows, lines = Rows(examples, task.encode(examples, None, 66).features), []
        with fast_path(model, task, {"train": rows, "validation": rows}, TrainingOptions(trunk_cache=cache),
                       make_engine("fp32")) as notes:  # fmt: skip
            assert any("computed once a row" in note for note in notes) == (kept and cache != "off")
            trained(task, model, rows, tmp_path / cache, lines.append, epochs=2)
        losses[cache] = [line["loss"] for line in lines if "loss" in line]
    assert losses["1GB"] == pytest.approx(losses["off"], rel=1e-5)


@pytest.mark.parametrize(("family", "told"), [
    ("layoutlmv2", "needs detectron2.*LayoutLMv3"), ("layoutxlm", "needs detectron2"), ("bert", "takes no boxes.*LayoutLM"),
    ("bros", "takes no boxes"),
])  # fmt: skip
def test_other_bases_are_refused_by_name(family, told):
    config = type("Config", (), {"model_type": family})()
    with pytest.raises(ConfigError, match=told):
        DocumentTokenClassification.for_base(config)


def test_what_is_read_again_encodes_alike(bases, tmp_path):
    task, examples = made(bases["layoutlm"], rows_of(5))
    task.load_model(str(bases["layoutlm"]))
    task.processor.save_pretrained(tmp_path)
    settings = json.loads(json.dumps(task.settings()))
    again = task_from_settings(settings, load_processor(ModelSource("", str(bases["layoutlm"]), ""), "document", tmp_path))
    assert again.encode(examples, 13, 66).features == task.encode(examples, 13, 66).features
    kind = again.kind.make(rows_of(1)[0], 2)
    assert kind.value == examples[0].value
