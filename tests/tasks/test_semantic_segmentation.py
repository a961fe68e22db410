"""A class for every pixel: what a mask means, and that picture and mask stay together."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from picture_bases import disc_and_mask, save_mobilenet, save_segformer, save_vit
from PIL import Image

from afina.data.sources import read_rows
from afina.errors import ConfigError, DataError
from afina.tasks.semantic_segmentation import SegmentationOptions, SemanticSegmentation
from afina.training.models import find_model, load_processor
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    chance = random.Random(0)
    for side, rows in (("train", 31), ("test", 11)):
        for name in ("images", "masks"):
            (folder / "rows" / side / name).mkdir(parents=True)
        for i in range(rows):
            picture, mask = disc_and_mask(chance)
            picture.save(folder / "rows" / side / "images" / f"{i}.jpg", quality=95)
            mask.save(folder / "rows" / side / "masks" / f"{i}.png")
    save_segformer(folder / "base")
    return folder


def task_of(places, learned=("ground", "disc"), **options):
    processor = load_processor(find_model(str(places / "base")), "image_processor")
    return SemanticSegmentation(processor, SegmentationOptions(**options), {"labels": list(learned)})


def feature_of(places, i=3):
    folder = places / "rows" / "train"
    return {"file": str(folder / "images" / f"{i}.jpg"), "mask": str(folder / "masks" / f"{i}.png"), "length": 1, "row": 0}


def test_discs_are_found(places, tmp_path):
    recipe = Recipe(
        task={"name": "semantic_segmentation", "classes": ["ground", "disc"]}, model=str(places / "base"),
        data=DataOptions(file=str(places / "rows")), method={"name": "lora", "r": 3},
        training=TrainingOptions(epochs=6, batch_size=5, learning_rate=1e-2, precision="fp32"),
    )  # fmt: skip
    run = prepare(recipe, tmp_path / "run")
    metrics = run.execute()
    test = metrics["test"]
    assert test["mean_iou"] > metrics["baselines"]["majority"]["mean_iou"] + 0.2
    assert test["iou"]["disc"] > 0.4
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 22  # picture and mask of each row
    assert "Intersection over union of each class" in page


@pytest.mark.parametrize("augment", ["flip", "crop", "crop_and_flip"])
def test_what_is_drawn_of_a_picture_is_drawn_of_its_mask(places, augment):
    task = task_of(places, augment=augment)
    for step in range(12):
        made = task.ready(feature_of(places), f"0/{step}/0")
        disc = made["labels"] == 1
        bright = made["pixel_values"][0]
        assert disc.any()
        assert bright[disc].mean() > bright[made["labels"] == 0].mean() + 0.5


def test_numbers_of_a_mask_are_what_they_are_whatever_the_processor_was_made_for(places):
    """The processor of the base takes one off every number, as its own data asked for."""
    task = task_of(places)
    assert task.processor.do_reduce_labels
    assert set(np.unique(task.ready(feature_of(places))["labels"])) == {0, 1, 255}


def test_ignored_pixels_count_nowhere(places):
    task = task_of(places)
    model = task.load_model(str(places / "base")).eval()
    batch = task.collate([feature_of(places)])
    other = {**batch, "labels": batch["labels"].clone()}
    ignored = batch["labels"] == 255
    assert ignored.any()
    assert task.targets_in(batch) == int((~ignored).sum())
    with torch.no_grad():
        scores = task.logits(model, batch).log_softmax(1)
        loss = float(task.loss_sum(model, batch))
        answer = task.answers(model, other)[0]
    wanted = -sum(float(scores[0, int(label), y, x]) for (y, x), label in np.ndenumerate(batch["labels"][0].numpy())
                  if label != 255)  # fmt: skip
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert answer["taken"].sum() == int((~ignored).sum())


def test_figures_are_those_of_the_definition(places):
    task = task_of(places, ("a", "b", "c"))
    truth, answer = torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 1, 1, 0]])
    made = task.metrics([{"taken": task._taken(truth, answer), "loss": 3.0}], [None])
    assert made["iou"] == {"a": 0.5, "b": 0.5, "c": None}
    assert made["mean_iou"] == 0.5
    assert made["pixel_accuracy"] == pytest.approx(2 / 3)
    assert made["loss"] == 1.0


def test_masks_are_checked(places, tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "rows" / name).mkdir(parents=True)
    picture, mask = disc_and_mask(random.Random(0))
    for i in range(3):
        picture.save(tmp_path / "rows" / "images" / f"{i}.png")
    options = DataOptions(file=str(tmp_path / "rows"))
    with pytest.raises(DataError) as caught:
        read_rows(options, SemanticSegmentation.kind)
    assert all(f"images/{i}.png has no mask masks/{i}.png" in str(caught.value) for i in range(3))
    task = task_of(places)
    Image.new("L", (5, 5)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match=r"small.png has 5 x 5 pixels, its picture 37 x 29"):
        task.ready({**feature_of(places), "mask": str(tmp_path / "small.png")})
    mask.point(lambda n: 7 if n == 1 else n).save(tmp_path / "seven.png")
    with pytest.raises(DataError, match=r"seven.png holds the number 7; the model knows 0 to 1"):
        task.ready({**feature_of(places), "mask": str(tmp_path / "seven.png")})
    with pytest.raises(ConfigError, match=r"task\.classes names 1 classes, but the masks hold numbers up to 1"):
        task_of(places, ("0", "1"), classes=["ground"])


def test_a_model_without_masks_is_refused(tmp_path):
    processor = load_processor(find_model(str(save_vit(tmp_path / "vit"))), "image_processor")
    with pytest.raises(ConfigError, match="knows no masks"):
        SemanticSegmentation(processor, SegmentationOptions(), {"labels": ["a", "b"]})
    save_mobilenet(tmp_path / "mobilenet")  # whose processor does
    SemanticSegmentation(load_processor(find_model(str(tmp_path / "mobilenet")), "image_processor"))
