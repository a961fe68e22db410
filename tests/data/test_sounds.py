"""Folders and lists of recordings: what is read, what is broken, what is the same; and rates."""

from __future__ import annotations

import csv
import random
import sys

import numpy as np
import pytest
from sound_bases import sound, write_sounds

from afina.data.columns import chosen_columns
from afina.data.divide import divided
from afina.data.options import CleanOptions, DataOptions
from afina.data.sounds import SOUND, read_sound, resampled, size_of
from afina.data.sources import read_rows
from afina.errors import DataError, MissingDependencyError, Problems
from afina.tasks.audio_classification import AudioClassification

soundfile = pytest.importorskip("soundfile")
KIND = AudioClassification.kind


def rows_of(options):
    table = read_rows(options, KIND)
    problems = Problems("")
    columns = chosen_columns(table, KIND, options, problems)
    assert not problems.found
    return divided(table, KIND, options, columns=columns, seed=0)


def tone(rate, hertz, seconds=0.5):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


# --- rates


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (44100, 16000), (22050, 16000), (48000, 16000), (11025, 8000),
                                              (16000, 44100), (7919, 16000)])  # fmt: skip
def test_a_tone_stays_the_tone_at_another_rate(rate, wanted):
    hertz = 0.4 * min(rate, wanted)  # 80 % of what both can hold
    made = resampled(tone(rate, hertz), rate, wanted)
    expected = tone(wanted, hertz)
    assert made.dtype == np.float32
    assert len(made) == -(-len(tone(rate, hertz)) * wanted // rate)
    inside = slice(len(made) // 5, -len(made) // 5)
    exact = 1e-4 if rate != 7919 else 2e-2  # whose fraction is rounded, and so is the pitch
    assert np.abs(made[inside] - expected[: len(made)][inside]).max() < exact


@pytest.mark.parametrize(("rate", "wanted"), [(44100, 16000), (48000, 16000), (16000, 8000), (22050, 16000)])
def test_what_the_new_rate_cannot_hold_is_gone(rate, wanted):
    made = resampled(tone(rate, 0.53 * wanted), rate, wanted)
    inside = made[len(made) // 5 : -len(made) // 5]
    assert np.abs(inside).max() < 1e-4  # and no echo of it at a lower pitch


def test_the_same_rate_changes_nothing():
    sound = tone(16000, 440).astype(np.float32)
    assert (resampled(sound, 16000, 16000) == sound).all()


def test_the_first_samples_are_those_of_the_whole(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(44100, 440, 2.0), 44100)
    whole, first = read_sound(tmp_path / "a.wav", 16000), read_sound(tmp_path / "a.wav", 16000, 10007)
    assert (len(whole), len(first)) == (32000, 10007)
    np.testing.assert_allclose(first, whole[:10007], atol=1e-6)
    assert size_of(tmp_path / "a.wav").at(16000) == 32000


def test_channels_are_mixed_and_that_is_told(tmp_path):
    left, right = tone(8000, 440).astype(np.float32), tone(8000, 770).astype(np.float32) / 3
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    np.testing.assert_allclose(read_sound(tmp_path / "a.wav", 8000), (left + right) / 2, atol=1e-6)
    assert SOUND.look(tmp_path / "a.wav").notes == ("of 2 channels, mixed to one",)


# --- places


@pytest.mark.parametrize("sides", [(), ("train", "test")])
def test_a_folder_for_each_class_with_sides_above_or_not(tmp_path, sides):
    write_sounds(tmp_path, 7, sides=sides)
    done = rows_of(DataOptions(file=str(tmp_path)))
    assert {e.label for e in done.examples} == {"high", "low"}
    assert len(done.examples) == 14 * max(1, len(sides))
    assert all(e.value.endswith(str(e.line)) for e in done.examples)


def test_a_folder_without_recordings_says_what_was_expected(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(DataError, match=r"holds notes\.md; expected a subfolder of recordings for each class"):
        read_rows(DataOptions(file=str(tmp_path)), KIND)


# --- broken files


def broken(folder):
    """Recordings of which nothing or not all can be heard, among good ones; the list of all."""
    write_sounds(folder, 9)
    good = sound("low", random.Random(5), least=0.5, most=0.6)
    place = folder / "low"
    for name in ("cut.wav", "cut.flac", "cut.ogg", "cut.mp3"):
        soundfile.write(place / name, np.tile(good, 5), 8000)
        held = (place / name).read_bytes()
        (place / name).write_bytes(held[: len(held) * 2 // 3])
    (place / "empty.wav").write_bytes(b"")
    (place / "text.wav").write_text("no recording")
    soundfile.write(place / "still.wav", np.zeros(4001), 8000)
    soundfile.write(place / "against.wav", np.stack([good, -good], 1), 8000)
    soundfile.write(place / "short.wav", good[:97], 8000)
    soundfile.write(place / "holes.wav", np.where(np.arange(len(good)) == 71, np.nan, good), 8000, subtype="FLOAT")
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "label"])
        for path in sorted(folder.glob("*/*")):
            writer.writerow([path.relative_to(folder), path.parent.name])
        writer.writerow(["low/none.wav", "low"])
    return folder / "list.csv"


def test_broken_files_are_told_together(tmp_path):
    with pytest.raises(DataError) as caught:
        rows_of(DataOptions(file=str(broken(tmp_path))))
    said = str(caught.value)
    for name, what in {
        "cut.wav": "truncated", "cut.flac": "broken: flac decoder lost sync", "cut.ogg": "its last page",
        "cut.mp3": "truncated", "empty.wav": "empty", "text.wav": "no recording", "still.wav": "silent",
        "against.wav": "cancel", "short.wav": "12 milliseconds", "holes.wav": "no numbers", "none.wav": "no such file",
    }.items():  # fmt: skip
        line = next(line for line in said.splitlines() if name in line)
        assert what in line, line
    assert "data.clean.broken_files=true" in said


def test_broken_files_are_left_out_where_that_is_asked_and_told(tmp_path):
    done = rows_of(DataOptions(file=str(broken(tmp_path)), clean=CleanOptions(broken_files=True)))
    assert len(done.examples) == 18
    assert "11 rows left out: the recording cannot be read" in "\n".join(done.lines())


def test_without_soundfile_the_install_command_is_said(tmp_path, monkeypatch):
    write_sounds(tmp_path, 3)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'afina\[speech\]'"):
        rows_of(DataOptions(file=str(tmp_path)))


# --- the same recording


def test_t27_the_same_samples_in_another_file_are_the_same_row(tmp_path):
    write_sounds(tmp_path, 9)
    heard, rate = soundfile.read(tmp_path / "low" / "3.wav", dtype="int16")
    soundfile.write(tmp_path / "low" / "copy.flac", heard, rate)
    soundfile.write(tmp_path / "high" / "wrong.flac", soundfile.read(tmp_path / "low" / "4.wav", dtype="int16")[0], rate)
    done = rows_of(DataOptions(file=str(tmp_path)))
    assert len(done.examples) == 17  # one of two, and neither of those with two labels
    assert len({e.text for e in done.examples}) == 17
