"""Recordings: that padding is never seen, which head a model gets, what is cut, and real spoken digits."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from sound_bases import PITCHES, save_ast, save_wav2vec2, save_whisper_encoder, write_sounds

from afina.errors import ConfigError, DataError
from afina.tasks.audio_classification import AudioClassification, AudioClassificationOptions
from afina.training.models import find_model, load_processor
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun

soundfile = pytest.importorskip("soundfile")
BASES = {"wav2vec2": save_wav2vec2, "group": lambda folder: save_wav2vec2(folder, "group"), "ast": save_ast,
         "whisper": save_whisper_encoder}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    write_sounds(folder / "rows", 23)
    for name, save in BASES.items():
        save(folder / name)
    return folder


def task_of(places, base, **options):
    processor = load_processor(find_model(str(places / base)), "feature_extractor")
    return AudioClassification(processor, AudioClassificationOptions(**options), {"labels": sorted(PITCHES)})


def recipe(places, base, *, options=(), file="rows", **training):
    return Recipe(
        task={"name": "audio_classification", **dict(options)}, model=str(places / base),
        data=DataOptions(file=str(places / file)), method={"name": "lora", "r": 3},
        training=TrainingOptions(**{"epochs": 8, "batch_size": 7, "learning_rate": 5e-3, "precision": "fp32", **training}),
    )  # fmt: skip


@pytest.mark.parametrize("base", sorted(BASES))
def test_t25_a_recording_means_the_same_whatever_stands_beside_it(places, base):
    task = task_of(places, base)
    model = task.load_model(str(places / base)).eval()
    files = sorted((places / "rows" / "low").iterdir())[:5]
    features = [{"file": str(p), "holds": "", "length": 1, "row": i} for i, p in enumerate(files)]
    with torch.no_grad():
        together = task.logits(model, task.collate(features))
        each = torch.cat([task.logits(model, task.collate([f])) for f in features])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-5)
    assert each.std(0).max() > 1e-4
    assert bool(task.paths(model)) == (base == "group")


@pytest.mark.parametrize("base", sorted(BASES))
def test_every_architecture_learns_and_answers(places, tmp_path, base):
    run = prepare(recipe(places, base), tmp_path / "run")
    metrics = run.execute()
    assert metrics["test"]["accuracy"] > metrics["baselines"]["majority"]["accuracy"] + 0.2
    trained = TrainedRun.load(tmp_path / "run")
    (answer,) = trained.answers(trained.asked([{"audio": str(places / "rows" / "low" / "3.wav")}]))
    assert set(trained.task.columns(answer, run.rows["test"].examples[0])) == {"answer", "p(high)", "p(low)"}


def test_a_whisper_gives_its_encoder_and_nothing_of_it_is_new(places):
    whole = tf.WhisperForConditionalGeneration.from_pretrained(places / "whisper")
    made = task_of(places, "whisper").load_model(str(places / "whisper"))
    for name, weight in whole.model.encoder.state_dict().items():
        assert (made.encoder.state_dict()[name] == weight).all(), name


def test_t03_nothing_is_drawn_behind_the_back_of_the_run(places):
    config = task_of(places, "wav2vec2").load_model(str(places / "wav2vec2")).config
    assert tf.Wav2Vec2Config().layerdrop > 0  # what a checkpoint says
    assert tf.Wav2Vec2Config().apply_spec_augment
    assert config.layerdrop == 0
    assert not config.apply_spec_augment


def test_what_is_cut_and_resampled_is_told(places, tmp_path):
    run = prepare(recipe(places, "wav2vec2", options={"max_seconds": 0.2}, max_truncated=0.5), tmp_path / "run")
    cut = run.encoded.truncated
    assert 0 < cut < 23
    assert f"{cut} recordings are cut at their end to 0.2 seconds" in run.encoded.notes
    assert "46 recordings are brought from 8,000 to 4,000 Hz" in run.encoded.notes
    assert max(run.encoded.lengths) == 800
    with pytest.raises(DataError, match=r"46 of 46 rows \(100%\) are cut off: .* to 0\.1 seconds.*into pieces"):
        prepare(recipe(places, "wav2vec2", options={"max_seconds": 0.1}), tmp_path / "again")
    with pytest.raises(ConfigError, match="reads no tokens"):
        prepare(recipe(places, "wav2vec2", max_length=17), tmp_path / "again")


def test_what_the_extractor_takes_is_a_limit_too(places):
    assert task_of(places, "whisper").most == 16000
    assert task_of(places, "ast").most == 22 * 80 + 200
    assert task_of(places, "wav2vec2", max_seconds=0.25).most == 1000


def test_a_recording_that_goes_away_is_named(places, tmp_path):
    write_sounds(tmp_path / "rows", 7)
    asked = recipe(places, "wav2vec2")
    asked.data.file = str(tmp_path / "rows")
    run = prepare(asked, tmp_path / "run")
    for path in (tmp_path / "rows" / "low").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"low/\d+\.wav: .*; it could be read when the run began"):
        run.execute()
