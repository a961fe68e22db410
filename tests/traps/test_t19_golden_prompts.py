"""T19: an export that answers otherwise than its run is not written, and one that has changed since is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))

from runs_made import exported, language_run

from afina.errors import CheckpointError
from afina.export import gguf, merged
from afina.export.exporting import verify
from afina.export.golden import GOLDEN, read_golden, write_golden


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return language_run("Llama", tmp_path_factory.mktemp("t19") / "made")


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    return exported(run, "merged", tmp_path_factory.mktemp("t19") / "out").folder


@pytest.fixture
def artefact(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def change_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_template(folder):
    for path in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        if path.suffix == ".jinja":
            path.unlink(missing_ok=True)
        else:
            said = json.loads(path.read_text(encoding="utf-8"))
            said.pop("chat_template", None)
            path.write_text(json.dumps(said), encoding="utf-8")


def forget_stops(folder):
    path = folder / "generation_config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["eos_token_id"] = 0
    path.write_text(json.dumps(said), encoding="utf-8")


def split_otherwise(folder):
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["normalizer"] = None
    path.write_text(json.dumps(said), encoding="utf-8")


CHANGES = {
    change_weight: "probabilities differ by up to",
    drop_template: "the chat template inside it is none",
    forget_stops: "it does not stop at </s>",
    split_otherwise: "it became the tokens",
}


def test_t19_an_export_answers_as_it_did(artefact):
    replayed, name = verify(artefact)
    assert name == "merged"
    assert replayed.prompts >= 3
    assert replayed.largest < 1e-4


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_t19_what_was_tampered_with_is_refused(change, artefact):
    change(artefact)
    with pytest.raises(CheckpointError, match=r"is not the file that was written|is missing"):
        verify(artefact)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_t19_the_answers_tell_too_where_the_checksums_do_not(change, artefact):
    change(artefact)
    write_golden(artefact, read_golden(artefact))  # with checksums of what is there now
    with pytest.raises(CheckpointError, match=CHANGES[change]):
        verify(artefact)


def test_t19_the_first_prompt_that_differs_is_shown(artefact):
    golden = read_golden(artefact)
    change_weight(artefact)
    write_golden(artefact, golden)
    with pytest.raises(CheckpointError) as told:
        verify(artefact)
    assert golden["prompts"][0]["row"]["text"][:40] in str(told.value)


def test_t19_the_golden_prompts_are_of_different_kinds(made):
    golden = read_golden(made)
    said = " ".join(prompt["why"] for prompt in golden["prompts"])
    assert all(kind in said for kind in ("shortest", "longest", "typical", "beyond ASCII"))
    assert golden["chat_template"]
    assert golden["stop_tokens"] == {"</s>": 2}
    assert all(prompt["run"]["continuation"] is not None for prompt in golden["prompts"])


def test_t19_a_converter_that_errs_leaves_nothing(run, tmp_path, monkeypatch):
    """Llama's queries and keys in the order of transformers: the file loads, and answers nonsense."""
    monkeypatch.setattr(gguf, "_paired", lambda tensor, heads: tensor)
    with pytest.raises(CheckpointError, match=r"(?s)does not answer as it should.*golden prompt.*probabilities differ"):
        exported(run, "gguf", tmp_path / "out", quantisation="f32")
    assert not any(tmp_path.iterdir())


def test_t19_a_merge_that_leaves_a_layer_out_is_told(run, tmp_path, monkeypatch):
    whole = merged.merged_tensors

    def without(adapters):
        for part in whole(adapters):
            yield {k: torch.zeros_like(v) if k.endswith("layers.0.mlp.up_proj.weight") else v for k, v in part.items()}

    monkeypatch.setattr(merged, "merged_tensors", without)
    with pytest.raises(CheckpointError, match="golden prompt"):
        exported(run, "merged", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_t19_what_is_no_export_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        verify(tmp_path / "nothing")
    (tmp_path / "some.txt").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"holds no {GOLDEN}.*some\.txt"):
        verify(tmp_path)
