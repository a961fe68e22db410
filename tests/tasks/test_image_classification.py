"""Pictures: what is drawn of them, what stays still, which head a model gets, and what is computed once."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from picture_bases import SHAPES, picture, save_mobilenet, save_vit, write_pictures
from PIL import Image

from afina.errors import ConfigError, DataError, TrainingError
from afina.tasks.image_classification import ImageClassification, ImageClassificationOptions
from afina.tasks.pictures import cut_out
from afina.training.ahead import Ahead
from afina.training.models import find_model, load_processor
from afina.training.plan import planner_for
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun

PROBE = {"name": "last_layers", "num_layers": 0}
LAST = {"name": "last_layers", "num_layers": 1}
LORA = {"name": "lora", "r": 3}
ROWS = 17  # of each class


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder / "rows", ROWS)
    save_vit(folder / "vit")
    save_mobilenet(folder / "mobilenet")
    return folder


def recipe(places, base, method, *, options=(), **training):
    return Recipe(
        task={"name": "image_classification", **dict(options)}, model=str(places / base),
        data=DataOptions(file=str(places / "rows")), method=dict(method),
        training=TrainingOptions(**{"epochs": 2, "batch_size": 7, "learning_rate": 5e-3, "precision": "fp32", **training}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def probed(places):
    """A run of the probe; tests leave it as it is."""
    prepare(recipe(places, "vit", PROBE, epochs=1), places / "probed").execute()
    return places / "probed"


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def task_of(places, base="vit", **options):
    processor = load_processor(find_model(str(places / base)), "image_processor")
    return ImageClassification(processor, ImageClassificationOptions(**options), {"labels": list(SHAPES)})


# --- what is computed once


@pytest.mark.parametrize(("base", "method", "blocks"), [
    ("vit", PROBE, "the first 3 of 3"), ("mobilenet", LAST, "the first 15 of 16"),
])  # fmt: skip
def test_t35_a_frozen_trunk_is_computed_once_and_changes_nothing(places, tmp_path, monkeypatch, base, method, blocks):
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    found = {}
    for cache in ("4GB", "off"):
        run = prepare(recipe(places, base, method, trunk_cache=cache), tmp_path / cache)
        notes = run.execute()["train"]["notes"]
        found[cache] = losses(run.output)
        told = next(note for note in notes if f"{blocks} blocks are frozen" in note)
        assert ("once a row" in told) == (cache == "4GB")
    assert found["4GB"] == pytest.approx(found["off"], rel=1e-5)


def test_t35_augmentation_and_the_frozen_trunk_exclude_each_other_and_that_is_told(places, tmp_path):
    run = prepare(recipe(places, "vit", PROBE, options={"augment": "flip"}, epochs=1), tmp_path / "run")
    notes = run.execute()["train"]["notes"]
    assert any("computed in every step (task.augment=flip makes a training row another in every epoch)" in n for n in notes)


# --- what is drawn


def test_what_is_drawn_follows_from_seed_step_and_row(places):
    task = task_of(places, augment="crop_and_flip")
    feature = {"file": str(places / "rows" / "disc" / "3.png"), "holds": "", "length": 1, "row": 0}
    one, again, other, plain = (task.ready(feature, c)["pixel_values"] for c in ("0/5/3", "0/5/3", "0/6/3", None))
    assert (one == again).all()
    assert (one != other).any()
    assert (one != plain).any()
    assert one.shape == plain.shape == (3, 16, 16)
    assert (task.ready(feature)["pixel_values"] == task_of(places).ready(feature, "0/5/3")["pixel_values"]).all()


def test_a_flip_is_a_mirror_image_half_of_the_time(places):
    task = task_of(places, augment="flip")
    feature = {"file": str(places / "rows" / "disc" / "3.png"), "holds": "", "length": 1, "row": 0}
    plain = task.ready(feature)["pixel_values"]
    made = [task.ready(feature, f"0/{step}/0")["pixel_values"] for step in range(40)]
    mirrored = [bool((m == plain[..., ::-1]).all()) for m in made]
    assert all(m or (x == plain).all() for m, x in zip(mirrored, made, strict=True))
    assert 8 < sum(mirrored) < 32


@pytest.mark.parametrize("size", [(211, 173), (17, 401), (1, 1)])
def test_a_crop_lies_inside_and_keeps_its_share(size):
    chance = random.Random(0)
    for _ in range(200):
        left, upper, right, lower = cut_out(size, 0.3, chance)
        assert 0 <= left < right <= size[0]
        assert 0 <= upper < lower <= size[1]
        assert (right - left) * (lower - upper) >= 0.29 * size[0] * size[1] or min(size) < 20


def test_rows_are_read_ahead_and_let_go(places):
    task = task_of(places)
    features = [{"file": str(p), "holds": "", "length": 1, "row": i} for i, p in enumerate((places / "rows").rglob("*.png"))]
    with Ahead(task, features, 0) as ahead:
        ahead.begin(0, [1, 2, 3])
        ahead.begin(1, [4, 5])
        assert (ahead.take(0, 2)["pixel_values"] == task.ready(features[2])["pixel_values"]).all()
        assert len(ahead.waiting) == 5
        ahead.forget(0)
        assert set(ahead.waiting) == {(1, 4), (1, 5)}
    assert not ahead.waiting


def test_a_picture_that_goes_away_is_named(places, tmp_path):
    shutil.copytree(places / "rows", tmp_path / "rows")
    asked = recipe(places, "vit", PROBE)
    asked.data.file = str(tmp_path / "rows")
    run = prepare(asked, tmp_path / "run")
    for path in (tmp_path / "rows" / "disc").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"disc/\d+\.png: .*; it could be read when the run began"):
        run.execute()


def test_t03_a_run_whose_pictures_changed_is_not_gone_on_with(places, tmp_path):
    shutil.copytree(places / "rows", tmp_path / "rows")
    asked = recipe(places, "vit", PROBE)
    asked.data.file = str(tmp_path / "rows")
    prepare(asked, tmp_path / "run").execute()
    for i in range(ROWS):
        picture("disc", random.Random(i + 1000)).save(tmp_path / "rows" / "disc" / f"{i}.png")
    with pytest.raises(TrainingError, match="training rows was"):
        prepare(asked, tmp_path / "run", resume=True).execute()


# --- what stays still


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


@pytest.mark.parametrize("method", [LORA, LAST])
def test_batchnorm_keeps_its_statistics_and_says_so(places, tmp_path, method):
    run = prepare(recipe(places, "mobilenet", method, epochs=1), tmp_path / "run")
    assert any("BatchNorm layers keep the statistics of the checkpoint, in training too" in note for note in run.notes)
    before = statistics(run.model)
    assert len(before) >= 52
    run.model.train()
    task, features = run.task, run.rows["train"].features
    for start in range(0, 21, 7):
        task.loss_sum(run.model, task.collate(features[start : start + 7]))
    after = statistics(run.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_t25_parts_of_a_step_change_no_loss_with_batchnorm(places, tmp_path):
    found = [losses(prepare(recipe(places, "mobilenet", LAST, epochs=1, gradient_accumulation=parts, evaluate_every=9.0),
                            tmp_path / str(parts)).execute() and tmp_path / str(parts)) for parts in (1, 3)]  # fmt: skip
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_convolutions_are_adapted_where_there_is_no_linear_layer(places, tmp_path):
    run = prepare(recipe(places, "mobilenet", LORA), None, trial=True)
    layers = [run.model.get_base_model().get_submodule(key) for key in run.model.adapters.injected["default"].adapted]
    assert len(layers) == 35
    assert any("35 convolutions are adapted instead (not the 17 that work on each channel alone)" in n for n in run.notes)


# --- heads


def test_t05_a_head_of_other_classes_though_as_many_is_made_anew(places, tmp_path):
    model = tf.AutoModelForImageClassification.from_pretrained(save_vit(tmp_path / "base"), id2label={0: "cat", 1: "dog"})
    model.save_pretrained(tmp_path / "base")
    task = task_of(places)
    loaded = task.load_model(str(tmp_path / "base"))
    assert not torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert torch.equal(loaded.vit.layernorm.weight, model.vit.layernorm.weight)
    asked = replace(recipe(places, "vit", LORA, epochs=1), model=str(tmp_path / "base"))
    run = prepare(asked, tmp_path / "run")
    assert "classifier" in run.model.adapters.injected["default"].saved
    run.execute()


def test_a_head_that_knows_the_classes_is_kept_with_its_order(places, tmp_path):
    names = dict(enumerate(reversed(SHAPES)))
    model = tf.AutoModelForImageClassification.from_pretrained(save_vit(tmp_path / "base"), id2label=names)
    model.save_pretrained(tmp_path / "base")
    task = task_of(places)
    loaded = task.load_model(str(tmp_path / "base"))
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert task.labels == list(reversed(SHAPES))


# --- around it


def test_answers_are_those_of_transformers(places, probed):
    trained = TrainedRun.load(probed)
    files = sorted((places / "rows").rglob("*.png"))[:5]
    answers = trained.answers(trained.asked([{"image": str(f)} for f in files]))
    processor = tf.AutoImageProcessor.from_pretrained(probed / "adapter", backend="pil")
    with torch.no_grad():
        batch = processor([Image.open(f).convert("RGB") for f in files], return_tensors="pt")
        expected = trained.model(**batch).logits.softmax(-1)
    assert np.stack(answers) == pytest.approx(expected.numpy(), abs=1e-6)


def test_broken_pictures_are_not_answered_but_named(probed, tmp_path):
    (tmp_path / "bad.png").write_text("no")
    with pytest.raises(DataError) as caught:
        TrainedRun.load(probed).asked([{"image": str(tmp_path / name)} for name in ("bad.png", "none.png")])
    assert "bad.png: it is no picture that can be read" in str(caught.value)
    assert "none.png: there is no such file" in str(caught.value)


def test_pictures_of_several_sizes_are_told(places):
    task = task_of(places)
    task.processor.do_resize = False
    files = [str(places / "rows" / "disc" / "1.png"), str(places / "rows" / "wide.png")]
    picture("disc", random.Random(0), (61, 29)).save(files[1])
    try:
        with pytest.raises(DataError, match=r"pictures of different sizes: \[3, 29, 37\] .*, \[3, 29, 61\]"):
            task.collate([{"file": f, "length": 1, "row": 0} for f in files])
    finally:
        (places / "rows" / "wide.png").unlink()


def test_max_length_does_nothing_and_is_refused(places):
    with pytest.raises(ConfigError, match="image_classification reads no tokens"):
        prepare(recipe(places, "vit", LORA, max_length=64), None, trial=True)


@pytest.mark.parametrize("file", [True, False])
def test_a_plan_needs_no_pictures(places, file):
    asked = recipe(places, "mobilenet", LORA)
    asked.data.file = str(places / "rows") if file else ""
    footprint = planner_for(asked, "cuda").plan(asked)
    train = footprint.moments["train"].device
    assert train["activations"] > 7 * 3 * 32 * 32 * 4
    assert train["adapters"] > 0


# --- reading and varying


def test_whole_pictures_are_read_where_the_processor_cuts(places):
    """To the size that it would have cut out, by the processor itself, so that what is saved reads as what was trained."""
    cut, whole = task_of(places, "mobilenet"), task_of(places, "mobilenet", whole=True)
    edge = Image.new("RGB", (41, 37), (0, 0, 0))
    edge.paste((255, 255, 255), (0, 0, 2, 37))
    seen = [task.processor(images=edge, return_tensors="np")["pixel_values"][0] for task in (cut, whole)]
    assert seen[0].shape == seen[1].shape == (3, 32, 32)
    assert seen[1][0, :, 0].min() > 0.5 > seen[0][0, :, 0].max()
    assert whole.processor.to_dict() == task_of(places, "mobilenet", whole=True).processor.to_dict()
    again = type(whole.processor).from_dict(whole.processor.to_dict())
    assert (again(images=edge, return_tensors="np")["pixel_values"][0] == seen[1]).all()
    assert task_of(places, whole=True).processor.to_dict() == task_of(places).processor.to_dict()  # nothing is cut there


@pytest.mark.parametrize("options", [{"rotate": 90.0}, {"colour": 0.5}, {"hue": 0.3}])
def test_turned_and_lit_by_chance_alone(places, options):
    task, plain = task_of(places, **options), task_of(places)
    feature = {"file": str(places / "rows" / "disc" / "3.png"), "holds": "", "length": 1, "row": 0}
    one, again, other = (task.ready(feature, c)["pixel_values"] for c in ("0/5/3", "0/5/3", "0/6/3"))
    assert (one == again).all()
    assert (one != other).any()
    assert (task.ready(feature)["pixel_values"] == plain.ready(feature)["pixel_values"]).all()
    assert f"task.{next(iter(options))}=" in task.varies


def test_a_turned_picture_has_the_ground_of_its_corners_around_it(places, tmp_path):
    made = Image.new("RGB", (31, 17), (200, 10, 30))
    made.save(tmp_path / "plain.png")
    task = task_of(places, rotate=180.0)
    feature = {"file": str(tmp_path / "plain.png"), "holds": "", "length": 1, "row": 0}
    drawn = [task.ready(feature, f"0/{i}/0")["pixel_values"] for i in range(5)]
    assert all((pixels == drawn[0]).all() for pixels in drawn)


def test_pictures_are_read_at_another_size_where_the_model_can(places):
    assert task_of(places, "mobilenet", size=41, whole=True).processor.size == {"height": 41, "width": 41}
    task = task_of(places, "mobilenet", size=64)
    feature = {"file": str(places / "rows" / "disc" / "3.png"), "holds": "", "length": 1, "row": 0}
    assert task.ready(feature)["pixel_values"].shape == (3, 64, 64)
    assert task.processor.size["shortest_edge"] == 74  # the same part is cut out
    assert task.load_model(str(places / "mobilenet")) is not None
    with pytest.raises(ConfigError, match=r"task.size=41: ViTFor.* positions for pictures of 16 pixels"):
        task_of(places, size=41).load_model(str(places / "vit"))
    assert task_of(places, size=16).load_model(str(places / "vit")) is not None
