"""Runs that hear: every way of writing down speech, and classes of recordings, in every format that holds them."""

from __future__ import annotations

import numpy as np
import pytest
import sound_bases
from every_task import case
from runs_made import exported, finished
from test_formats_of_tasks import both, rows_of

from afina.errors import CheckpointError
from afina.export.exporting import verify
from afina.export.formats import find_format
from afina.training.recipe import DataOptions
from afina.training.trained import TrainedRun

WAYS = {
    "whisper": ("speech_recognition", sound_bases.save_whisper, {"language": "en", "max_new_tokens": 5}),
    "two models": ("speech_recognition", sound_bases.save_two_models, {"max_new_tokens": 5}),
    "letters of its own": ("speech_recognition", lambda p: sound_bases.save_wav2vec2_ctc(p, letters="13w"), {}),
    "new letters": ("speech_recognition", lambda p: sound_bases.save_wav2vec2_ctc(p, "group"), {}),
    "frames": ("audio_classification", sound_bases.save_ast, {}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of each way, trained when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("hearing"), {}

    def trained(way):
        if way not in made:
            task, save, options = WAYS[way]
            save(folder / way / "base")
            recipe = case("audio_classification", folder / way, rows=29, epochs=3, learning_rate=2e-2)
            if task == "speech_recognition":
                recipe.data = DataOptions(file=str(sound_bases.write_transcripts(folder / way / "said", 29)))
            recipe.task = {"name": task, **options}
            made[way] = finished(recipe, folder / way / "run")
        return made[way]

    return trained


@pytest.mark.parametrize(("way", "name"), [
    *((way, "onnx") for way in ("whisper", "letters of its own", "frames")),
    *((way, "merged") for way in ("two models", "new letters")), ("new letters", "int8"),
])  # fmt: skip
def test_what_was_heard_is_heard_from_the_artefact(run, way, name, tmp_path):
    done = exported(run(way), name, tmp_path / "out")
    ours, theirs, bare = both(run(way), name, done.folder)
    if name == "int8":
        assert 0 < np.abs(theirs - ours).mean() < 0.35 * np.abs(bare - ours).mean()
    else:
        np.testing.assert_allclose(theirs, ours, atol=5e-5)
    assert np.abs(ours - bare).max() > 1e-3
    assert verify(done.folder)[1] == name
    trained = TrainedRun.load(run(way))
    if name != "int8":
        made, own = find_format(name), trained.task
        features = own.encode(rows_of(trained), None, 10**6).features[:3]
        batch = own.collate([{**f, "row": 0} for f in features])
        said = own.final_answers(made.load(done.folder, own), batch)
        assert [getattr(a, "text", 0) for a in said] == [
            getattr(a, "text", 0) for a in own.final_answers(trained.model.eval(), batch)
        ]


def test_a_recording_that_was_exchanged_is_noticed(run, tmp_path):
    done = exported(run("whisper"), "merged", tmp_path / "out")
    first, second = sorted((done.folder / "golden").glob("*-audio.wav"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=f"golden/{first.name} is not the file that was written"):
        verify(done.folder)
