"""Runs on as few bases as there can be, each answering as it does alone."""

from __future__ import annotations

import numpy as np
import pytest
from serving_runs import texts

from afina.core.runtime import BASE_ROW
from afina.errors import CheckpointError, ConfigError
from afina.serving.models import load_models, named_runs
from afina.serving.reading import read_together
from afina.training.trained import TrainedRun

NAMES = ("two", "three", "number", "several")


def test_runs_share_bases(models):
    lanes = {name: models.lanes.index(served.lane) for name, served in models.by_name.items()}
    assert lanes["two"] == lanes["three"] == lanes["number"] == lanes["several"] == lanes["prompted"]
    assert lanes["first"] == lanes["second"] == lanes["running"] == lanes["llama"]
    assert lanes["blocks"] not in (lanes["two"], lanes["tags"])  # whole blocks do not fit around wrapped layers
    assert len(models.lanes) == 7
    weights = {served.lane.model.get_input_embeddings().weight.data_ptr() for served in models.by_name.values()}
    assert len(weights) == 7
    assert {name for name, served in models.by_name.items() if not served.tuned} == {"llama", "t5", "bert"}
    assert sum("blocks has a base of its own" in note for note in models.notes) == 1


def test_what_cannot_be_mixed_is_found_out(models):
    assert {name for name, served in models.by_name.items() if not served.mixes} == {"prompted"}
    assert not any(served.whole for served in models.by_name.values())


def features(served, count, seed):
    run = served.run
    examples = run.asked([{"text": text} for text, _ in texts(count, seed)])
    return list(served.task.encode(examples, None, served.lane.limit).features)


def test_heads_of_different_sizes_in_one_pass_answer_as_alone(models):
    asked = [(models.by_name[name], features(models.by_name[name], 3, seed)) for seed, name in enumerate(NAMES)]
    lane = asked[0][0].lane
    together = read_together(lane, asked)
    for (served, own), answers in zip(asked, together, strict=True):
        for feature, answer in zip(own, answers, strict=True):
            (alone,) = read_together(lane, [(served, [feature])])
            np.testing.assert_allclose(answer, alone[0], rtol=1e-5, atol=1e-5)
    sizes = {name: np.size(answers[0]) for name, answers in zip(NAMES, together, strict=True)}
    assert sizes == {"two": 2, "three": 3, "number": 1, "several": 2}


@pytest.mark.parametrize("name", [*NAMES, "prompted", "blocks"])
def test_beside_others_a_run_answers_as_it_does_loaded_alone(models, encoders, name):
    served = models.by_name[name]
    alone = TrainedRun.load(encoders[name])
    examples = alone.asked([{"text": text} for text, _ in texts(5, 99)])
    right = alone.answers(examples)
    limit = served.lane.limit
    found = served.task.encode(examples, served.task.asked_length(alone.recipe.training.max_length, limit), limit).features
    (answers,) = read_together(served.lane, [(served, found)])
    np.testing.assert_allclose(np.stack(answers), np.stack(right), rtol=1e-5, atol=1e-5)


def test_the_base_is_left_as_it_was(models):
    served = models.by_name["bert"]
    assert served.adapter == BASE_ROW
    state = served.lane.state([BASE_ROW])
    assert not state.enabled


def test_names_and_folders_are_checked_together(tmp_path, encoders):
    assert list(named_runs(["a/b", "c=d/e"])) == ["b", "c"]
    with pytest.raises(ConfigError, match=r"two runs are called 'b'.*NAME=x/b"):
        named_runs(["a/b", "x/b"])
    with pytest.raises(ConfigError, match="expected FOLDER or NAME=FOLDER"):
        named_runs(["=x"])
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        load_models({"there": encoders["two"], "no": tmp_path / "no", "empty": tmp_path})
    assert "there is no run folder" in str(caught.value)
    assert "is no finished run" in str(caught.value)
