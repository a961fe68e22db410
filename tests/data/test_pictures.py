"""Folders and lists of pictures: what is read, what is broken, what is the same."""

from __future__ import annotations

import csv
import random

import numpy as np
import pytest
from picture_bases import picture, write_pictures
from PIL import Image

from afina.data.columns import chosen_columns
from afina.data.divide import divided
from afina.data.options import CleanOptions, DataOptions
from afina.data.pictures import PICTURE, read_mask, read_picture
from afina.data.sources import read_rows
from afina.errors import DataError, Problems
from afina.tasks.image_classification import ImageClassification

KIND = ImageClassification.kind


def rows_of(options):
    table = read_rows(options, KIND)
    problems = Problems("")
    columns = chosen_columns(table, KIND, options, problems)
    assert not problems.found
    return divided(table, KIND, options, columns=columns, seed=0)


def one(seed=0, size=(23, 17)):
    return picture("disc", random.Random(seed), size)


# --- places


@pytest.mark.parametrize("sides", [(), ("train", "test"), ("Training", "val", "test")])
def test_a_folder_for_each_class_with_sides_above_or_not(tmp_path, sides):
    write_pictures(tmp_path, 7, sides=sides)
    done = rows_of(DataOptions(file=str(tmp_path)))
    assert {e.label for e in done.examples} == {"disc", "stripes"}
    assert len(done.examples) == 14 * max(1, len(sides))
    if len(sides) == 3:
        assert {side: len(rows) for side, rows in done.sides.items()} == {"train": 14, "validation": 14, "test": 14}
    assert all(e.value.endswith(str(e.line)) for e in done.examples)


def test_a_list_names_files_beside_it(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label"])
        for i in range(12):
            one(i).save(tmp_path / "pictures" / f"{i}.png")
            writer.writerow([f"pictures/{i}.png", "even" if i % 2 else "odd"])
    monkeypatch.chdir("/")
    done = rows_of(DataOptions(file=str(tmp_path / "list.csv")))
    assert len(done.examples) == 12
    assert all(e.value == str(tmp_path / "pictures" / f"{i}.png") for i, e in enumerate(done.examples))


def test_pictures_that_lie_in_no_class_are_told(tmp_path):
    write_pictures(tmp_path, 3)
    one().save(tmp_path / "lost.png")
    with pytest.raises(DataError, match=r"1 of 7 lie elsewhere: lost\.png"):
        read_rows(DataOptions(file=str(tmp_path)), KIND)


def test_a_folder_without_pictures_says_what_was_expected(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(DataError, match=r"holds notes\.md; expected a subfolder of pictures for each class"):
        read_rows(DataOptions(file=str(tmp_path)), KIND)


# --- broken files


def broken(folder):
    """A truncated, an empty, a text and a missing picture among good ones; the list of all."""
    write_pictures(folder, 9)
    jpeg = folder / "disc" / "cut.jpg"
    one(size=(211, 173)).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-401])
    (folder / "disc" / "empty.png").write_bytes(b"")
    (folder / "stripes" / "text.png").write_text("no picture")
    png = folder / "stripes" / "half.png"
    one(size=(97, 61)).save(png)
    png.write_bytes(png.read_bytes()[: png.stat().st_size // 2])
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label"])
        for path in sorted(folder.glob("*/*")):
            writer.writerow([path.relative_to(folder), path.parent.name])
        writer.writerow(["disc/none.png", "disc"])
    return folder / "list.csv"


def test_broken_files_are_told_together(tmp_path):
    with pytest.raises(DataError) as caught:
        rows_of(DataOptions(file=str(broken(tmp_path))))
    said = str(caught.value)
    for name, what in (("cut.jpg", "broken"), ("empty.png", "empty"), ("text.png", "no picture"), ("half.png", "broken"),
                       ("none.png", "no such file")):  # fmt: skip
        line = next(line for line in said.splitlines() if name in line)
        assert what in line, line
    assert "data.clean.broken_files=true" in said


def test_broken_files_are_left_out_where_that_is_asked_and_told(tmp_path):
    done = rows_of(DataOptions(file=str(broken(tmp_path)), clean=CleanOptions(broken_files=True)))
    assert len(done.examples) == 18
    assert len(done.cleaned.broken_files) == 5
    said = "\n".join(done.lines())
    assert "5 rows left out: the picture cannot be read" in said
    assert "cut.jpg" in said


# --- modes


def test_every_mode_becomes_upright_rgb(tmp_path):
    grey = one().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear = one().convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    turned = one()
    exif = turned.getexif()
    exif[0x0112] = 6
    for name, made in {"grey": grey, "deep": deep, "clear": clear, "palette": one().convert("P"), "bits": grey.convert("1"),
                       "la": grey.convert("LA")}.items():  # fmt: skip
        made.save(tmp_path / f"{name}.png")
    one().convert("CMYK").save(tmp_path / "inks.jpg")
    turned.save(tmp_path / "turned.png", exif=exif)
    for path in tmp_path.iterdir():
        assert read_picture(path).mode == "RGB", path
    as_grey = np.asarray(grey.convert("RGB"))
    assert (np.asarray(read_picture(tmp_path / "deep.png")) == as_grey).all()
    assert (np.asarray(read_picture(tmp_path / "grey.png")) == as_grey).all()
    assert (np.asarray(read_picture(tmp_path / "clear.png")) == 255).all()
    assert read_picture(tmp_path / "turned.png").size == (17, 23)
    assert (np.asarray(read_picture(tmp_path / "turned.png")) == np.rot90(np.asarray(one()), -1)).all()


def test_what_was_done_to_pictures_is_told(tmp_path):
    write_pictures(tmp_path, 5)
    for i in range(3):
        one(i + 70).convert("L").save(tmp_path / "disc" / f"grey{i}.png")
    said = "\n".join(rows_of(DataOptions(file=str(tmp_path))).lines())
    assert "3 pictures are grey, read as RGB (for example disc/grey0.png)" in said


def test_a_mask_is_numbers_and_no_colours(tmp_path):
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4)
    mask = Image.fromarray(numbers)
    mask.save(tmp_path / "grey.png")
    mask.putpalette(list(range(256)) * 3)
    mask.save(tmp_path / "palette.png")
    one().save(tmp_path / "colours.png")
    assert (read_mask(tmp_path / "grey.png") == numbers).all()
    assert (read_mask(tmp_path / "palette.png") == numbers).all()
    with pytest.raises(ValueError, match="mode RGB; a mask has one number a pixel"):
        read_mask(tmp_path / "colours.png")


# --- the same picture


def test_t27_the_same_picture_is_on_one_side(tmp_path):
    """Under another name, and saved in another form without loss."""
    write_pictures(tmp_path, 11, sides=("train", "test"), seed=5)
    for i in range(4):
        again = Image.open(tmp_path / "test" / "disc" / f"{i}.png")
        again.save(tmp_path / "train" / "disc" / f"copy{i}.bmp")
    done = rows_of(DataOptions(file=str(tmp_path)))
    assert len(done.cleaned.duplicates) == 4
    assert all(str(line).startswith("train/disc/copy") for line in done.cleaned.duplicates)  # the test side stays whole
    texts = {side: {done.examples[i].text for i in rows} for side, rows in done.sides.items()}
    assert not texts["train"] & texts["test"]
    assert any("4 rows dropped: the same picture with the same label" in line for line in done.lines())


def test_t27_one_picture_under_two_labels_is_dropped(tmp_path):
    write_pictures(tmp_path, 7)
    Image.open(tmp_path / "disc" / "3.png").save(tmp_path / "stripes" / "other.png")
    done = rows_of(DataOptions(file=str(tmp_path)))
    assert sorted(done.cleaned.conflicting_labels) == ["disc/3.png", "stripes/other.png"]


def test_a_look_is_of_what_is_seen(tmp_path):
    one().save(tmp_path / "a.png")
    one().save(tmp_path / "b.tiff")
    one(1).save(tmp_path / "c.png")
    a, b, c = (PICTURE.look(tmp_path / name).digest for name in ("a.png", "b.tiff", "c.png"))
    assert a == b != c
