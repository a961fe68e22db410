"""Each format of each task answers as the run does, in its own runtime, on rows that are no golden prompts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs_made import CASES, exported, task_run

from afina.errors import CheckpointError, ConfigError, MergeError
from afina.export.exporting import verify
from afina.export.format import Settings
from afina.export.formats import find_format
from afina.export.golden import read_golden
from afina.export.int8 import seven_bits
from afina.export.measures import figures_of, with_references
from afina.tasks.catalogue import task_from_settings
from afina.training.trained import TrainedRun

TRACED = ("sequence_classification", "regression", "reranking", "sentence_similarity", "causal_lm", "seq2seq", "dpo",
          "image_classification", "document_token_classification")  # fmt: skip


def rows_of(trained):
    """Examples of the test split."""
    from afina.data.read import read_table

    names = trained.columns
    table = read_table(trained.folder / "data" / "test.csv", set(names.values()))
    return trained.examples([{role: row[n] for role, n in names.items()} for row in table.rows], table.lines)


@torch.no_grad()
def outputs(model, task, examples, length):
    """Numbers that equal models agree on, of all rows in one padded batch."""
    features = task.encode(examples, length, length).features
    return task.outputs(model, task.collate([{**f, "row": 0} for f in features])).numpy()


def both(run, name, folder):
    """Outputs of the run and of the artefact on the test rows, and of the base without the adapter."""
    trained, made = TrainedRun.load(run), find_format(name)
    processor = made.processor(folder, trained.task.processor_kind)
    task = task_from_settings(read_golden(folder)["task"], processor, made.config(folder))
    examples, length = rows_of(trained), trained.recipe.training.max_length
    model = trained.model.eval()
    with model.disable_adapter():
        bare = outputs(model, trained.task, examples, length)
    return outputs(model, trained.task, examples, length), outputs(made.load(folder, task), task, examples, length), bare


@pytest.mark.parametrize("name", CASES)
def test_merged(runs, name, tmp_path):
    done = exported(runs(name), "merged", tmp_path / "out")
    ours, theirs, bare = both(runs(name), "merged", done.folder)
    np.testing.assert_allclose(theirs, ours, atol=2e-5)
    assert np.abs(ours - bare).max() > 1e-3  # the adapter is in it
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # nothing is left beside
    assert verify(done.folder)[1] == "merged"


@pytest.mark.parametrize("name", CASES)
def test_int8(runs, exports, name):
    if name == "reward" and seven_bits():  # too much for what hangs on small differences, so it is refused
        with pytest.raises(CheckpointError, match=r"0\.03 is allowed\n.*VNNI.*--format onnx-int8"):
            exports(name, "int8")
        return
    done = exports(name, "int8")
    ours, theirs, bare = both(runs(name), "int8", done.folder)
    error, moved = np.abs(theirs - ours).mean(), np.abs(bare - ours).mean()
    assert 0 < error < 0.35 * moved  # rounded, and far nearer to the run than to its base
    convolved = ("semantic_segmentation", "audio_classification", "document_token_classification")
    most = 0.9 if name in convolved else 0.62  # convolutions stay as they are
    assert done.bytes < most * done.merged_bytes
    assert done.rows > 0
    assert set(done.figures) >= {next(iter(TrainedRun.load(runs(name)).task.figures))}
    verify(done.folder)


@pytest.mark.parametrize("name", TRACED)
def test_onnx(runs, exports, name):
    done = exports(name, "onnx")
    ours, theirs, _ = both(runs(name), "onnx", done.folder)
    np.testing.assert_allclose(theirs, ours, atol=2e-5)
    for graph in done.folder.glob("*.onnx"):
        assert b"/site-packages/" not in graph.read_bytes()  # where it was traced is nobody's business


@pytest.mark.parametrize(("name", "output"), [
    ("sequence_classification", "probabilities"), ("regression", "value"), ("sentence_similarity", "sentence_embedding"),
    ("reranking", "score"),
])  # fmt: skip
def test_onnx_gives_the_answers_themselves(runs, exports, name, output):
    import onnxruntime

    done = exports(name, "onnx")
    trained = TrainedRun.load(runs(name))
    examples = [replace(e, label="") for e in rows_of(trained)][:3]
    if name == "sentence_similarity":
        examples = [replace(e, value=(e.value[0], None)) for e in examples]
    answers = trained.answers(examples)
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    assert [value.shape for value in session.get_inputs()] == [["rows", "tokens"]] * len(session.get_inputs())
    texts = [[e.value[0] if e.value else e.text for e in examples]]
    if name == "reranking":
        texts.append([e.value[1] for e in examples])
        answers = [trained.task.respond(answer, None)["score"] for answer in answers]
    given = trained.task.tokenizer(*texts, padding=True, return_tensors="np")
    wanted = {value.name: given[value.name] for value in session.get_inputs()}
    (found,) = session.run([output], wanted)
    expected = np.stack([np.asarray(a).reshape(found[0].shape) for a in answers])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_onnx_int8(runs, exports):
    done = exports("sequence_classification", "onnx-int8")
    ours, theirs, bare = both(runs("sequence_classification"), "onnx-int8", done.folder)
    assert 0 < np.abs(theirs - ours).mean() < 0.35 * np.abs(bare - ours).mean()
    assert done.speed is not None
    assert done.speed.ratio > 0


def test_merged_loads_where_afina_is_not(runs, exports):
    """Plain transformers, in a process that cannot import afina, answers as the run."""
    done = exports("sequence_classification", "merged")
    trained = TrainedRun.load(runs("sequence_classification"))
    example = rows_of(trained)[0]
    code = (
        "import sys, json; sys.modules['afina'] = None\n"
        "import torch; from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "folder, text = sys.argv[1:]\n"
        "model, words = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "with torch.no_grad(): p = model(**words(text, return_tensors='pt')).logits.softmax(-1)[0].tolist()\n"
        "print(json.dumps({model.config.id2label[i]: q for i, q in enumerate(p)}))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(done.folder), example.text], capture_output=True, text=True, check=True
    )
    (answer,) = trained.answers([replace(example, label="")])
    expected = trained.task.respond(answer, example)["probabilities"]
    found = json.loads(said.stdout.splitlines()[-1])
    assert found.keys() == expected.keys()
    assert all(abs(found[label] - expected[label]) < 1e-5 for label in expected)


def test_what_cannot_be_says_what_can(runs, tmp_path):
    for name in ("gguf", "gguf-adapter"):
        with pytest.raises(ConfigError, match=r"causal_lm.*regression.*int8"):
            exported(runs("regression"), name, tmp_path / "out")
    with pytest.raises(ConfigError, match="Did you mean 'merged'"):
        exported(runs("regression"), "mergd", tmp_path / "out")
    with pytest.raises(ConfigError, match="not quantised"):
        exported(runs("regression"), "merged", tmp_path / "out", base="pristine")
    run = task_run("sequence_classification", tmp_path / "made", method={"name": "bottleneck"})
    with pytest.raises(MergeError, match=r"cannot be merged[\s\S]*afina predict"):
        exported(run, "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_large_a_drop_is_refused_and_leaves_nothing(runs, tmp_path, monkeypatch):
    """Weights rounded to three values answer otherwise, and the figure tells."""
    from afina.export import int8

    def coarse(weight):
        values, scale = int8_rounded(weight)
        return (values.float() / 127).round().mul(127).to(torch.int8), scale

    int8_rounded = int8.rounded
    monkeypatch.setattr(int8, "rounded", coarse)
    monkeypatch.setattr(int8, "_TOLERANCE", 1.0)  # not told by the golden prompts before
    with pytest.raises(CheckpointError, match=r"RMSE on the \d+ validation rows went from .* --max-drop allows 0\.10%"):
        exported(runs("regression"), "int8", tmp_path / "out", max_drop=0.001)
    assert not any(tmp_path.iterdir())


# --- pictures


def test_pictures_travel_with_the_artefact(runs, tmp_path):
    """Golden rows are asked anywhere: their files are inside, and are checked like all others."""
    done = exported(runs("semantic_segmentation"), "merged", tmp_path / "out")
    there = shutil.move(done.folder, tmp_path / "elsewhere" / "moved")
    prompts = read_golden(there)["prompts"]
    named = {prompt["row"][role] for prompt in prompts for role in ("image", "label")}
    assert {p.relative_to(there).as_posix() for p in (there / "golden").iterdir()} == named
    assert all(len(one) <= 4096 for prompt in prompts for one in prompt["run"]["outputs"])  # not of every pixel
    verify(there)
    first, second = sorted((there / "golden").glob("*-image.png"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=f"golden/{first.name} is not the file that was written"):
        verify(there)


def test_onnx_of_pictures_gives_probabilities(runs, exports):
    import onnxruntime
    from PIL import Image

    done = exports("image_classification", "onnx")
    trained = TrainedRun.load(runs("image_classification"))
    examples = [replace(e, label="") for e in rows_of(trained)][:3]
    session = onnxruntime.InferenceSession(done.folder / "model.onnx")
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("pixel_values", ["rows", 3, 16, 16])
    pictures = [Image.open(e.value).convert("RGB") for e in examples]
    read = find_format("onnx").processor(done.folder, "image_processor")(pictures, return_tensors="np")
    (found,) = session.run(["probabilities"], {"pixel_values": read["pixel_values"]})
    np.testing.assert_allclose(found, np.stack(trained.answers(examples)), atol=1e-5)


# --- policies


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto", "grpo"])
def test_a_policy_without_its_reference_has_the_figures_of_its_run(runs, exports, name):
    trained = TrainedRun.load(runs(name))
    task, examples, length = trained.task, rows_of(trained), trained.recipe.training.max_length
    features = task.encode(examples, length or 61, length or 61).features
    if task.refers:
        features = with_references(trained.model.eval(), task, features)
    ours = figures_of(trained.model.eval(), task, examples, features)
    theirs = figures_of(find_format("merged").load(exports(name, "merged").folder, task), task, examples, features)
    assert set(ours) - set(theirs) <= {"kl", "loss"}
    assert "kl" not in theirs
    assert next(iter(task.figures)) in theirs
    assert theirs == pytest.approx({key: ours[key] for key in theirs}, rel=1e-3, abs=1e-4)


def test_a_policy_is_a_model_for_llama_cpp(runs):
    pytest.importorskip("gguf")
    trained = TrainedRun.load(runs("dpo"))
    find_format("gguf").check(trained.task, trained.model.get_base_model().config, Settings())
