"""A whole run: what is written, that it answers as trained, and that its recipe repeats it."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import yaml
from tiny_bases import save_bert, save_gpt2, write_rows

from afina.core.files import read_weights
from afina.data.clean import normalised
from afina.data.table import read_csv
from afina.errors import CheckpointError, ConfigError, DataError
from afina.training.recipe import DataOptions, Recipe, TrainingOptions, read_recipe
from afina.training.run import prepare
from afina.training.run_folder import write_csv
from afina.training.trained import TrainedRun


def recipe_for(base, rows, method, **training):
    data = DataOptions(file=str(rows), text="message", label="label")
    options = {"epochs": 3, "learning_rate": 1e-2, "precision": "fp32", **training}
    return Recipe(model=str(base), data=data, method=method, training=TrainingOptions(**options))


@pytest.fixture(scope="module", params=["bert lora", "gpt2 lora", "bert prefix_tuning", "gpt2 last_layers"])
def done(request, tmp_path_factory):
    base, name = request.param.split()
    folder = tmp_path_factory.mktemp("run")
    save = {"bert": save_bert, "gpt2": save_gpt2}[base]
    method = {"name": name, **({"num_virtual_tokens": 3} if name == "prefix_tuning" else {})}
    rows = write_rows(folder / "rows.csv", 149)
    run = prepare(recipe_for(save(folder / "base"), rows, method), folder / "run")
    return run, run.execute(), folder


def test_the_folder_holds_what_was_promised(done):
    run, metrics, _ = done
    there = {str(p.relative_to(run.output)) for p in run.output.rglob("*") if p.is_file()}
    assert {
        "recipe.yaml", "metrics.json", "log.jsonl", "predictions.csv", "data/train.csv", "data/validation.csv",
        "data/test.csv", "data/data_report.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json", "adapter/README.md", f"checkpoints/step-{metrics['train']['steps']}/state.json",
    } <= there  # fmt: skip
    assert not [name for name in there if "/." in f"/{name}"]
    written = json.loads((run.output / "metrics.json").read_text())
    assert written == json.loads(json.dumps(metrics))
    assert {"task", "figures", "test", "validation", "train", "versions", "baselines", "read_back"} == set(written)
    train = written["train"]
    assert train["trainable_parameters"] < train["total_parameters"]
    assert train["steps"] == 3 * -(-len(run.rows["train"].examples) // 16)
    assert train["tokens"] == 3 * sum(map(len, run.rows["train"].ids))
    assert written["read_back"]["largest_difference"] < 1e-4


def test_t27_no_text_on_two_sides(done):
    run, _, folder = done
    sides = {name: read_csv(run.output / "data" / f"{name}.csv", {"message"}).rows for name in run.rows}
    texts = [normalised(row["message"]) for rows in sides.values() for row in rows]
    assert len(texts) == len(set(texts)) == 149
    original = {row["message"]: row["label"] for row in read_csv(folder / "rows.csv").rows}
    assert all(original[row["message"]] == row["label"] for rows in sides.values() for row in rows)


def test_predictions_agree_with_the_figures_and_with_the_saved_run(done):
    run, metrics, _ = done
    with (run.output / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    right = [row["answer"] == row["label"] for row in rows]
    assert metrics["test"]["accuracy"] == pytest.approx(np.mean(right))
    assert [row["right"] == "yes" for row in rows] == right
    again = TrainedRun.load(run.output)
    again = again.answers(again.examples([{"text": row["message"]} for row in rows]))
    stored = [[float(row[f"p({label})"]) for label in run.task.labels] for row in rows]
    np.testing.assert_allclose(again, stored, atol=1e-4)


def test_it_learns(done):
    run, _, _ = done
    lines = [json.loads(line) for line in (run.output / "log.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_the_recipe_alone_repeats_the_run(done, tmp_path):
    run, metrics, _ = done
    again = prepare(read_recipe(run.output / "recipe.yaml"), tmp_path / "again")
    assert again.execute()["test"] == metrics["test"]
    assert (tmp_path / "again" / "recipe.yaml").read_text() == (run.output / "recipe.yaml").read_text()
    assert None not in yaml.safe_load((run.output / "recipe.yaml").read_text())["training"].values()
    first, second = (read_weights(r.output / "adapter" / "adapter_model.safetensors") for r in (run, again))
    assert all(np.array_equal(first[k], second[k]) for k in first.keys() | second.keys())


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    return save_bert(folder / "base"), write_rows(folder / "rows.csv", 31)


def test_output_folders(places, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    recipe = recipe_for(*places, {"name": "lora"})
    with pytest.raises(ConfigError, match="is not empty; take another folder"):
        prepare(recipe, taken)
    with pytest.raises(ConfigError, match="holds no run of afina"):
        prepare(recipe, taken, overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        prepare(recipe, taken / "thesis.txt")
    with pytest.raises(ConfigError, match="no run with checkpoints"):
        prepare(recipe, taken, resume=True)


def test_t30_too_many_texts_cut_off(places, tmp_path):
    with pytest.raises(DataError, match=r"longer than 4 tokens.*raise training\.max_length"):
        prepare(recipe_for(*places, {"name": "lora"}, max_length=4), tmp_path / "run")
    run = prepare(recipe_for(*places, {"name": "lora"}, max_length=4, max_truncated=1.0), tmp_path / "run")
    assert run.encoded.truncated > 0
    with pytest.raises(ConfigError, match="takes at most 61 tokens"):
        prepare(recipe_for(*places, {"name": "lora"}, max_length=62), tmp_path / "run")


def test_an_adapter_that_reads_back_differently_fails_the_run(places, tmp_path, monkeypatch):
    run = prepare(recipe_for(*places, {"name": "lora"}, epochs=1), tmp_path / "run")
    save = run.model.save_pretrained

    def broken(folder, **options):
        """Writes another adapter than the one whose answers were counted."""
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.5)
        save(folder, **options)

    monkeypatch.setattr(run.model, "save_pretrained", broken)
    with pytest.raises(CheckpointError, match="does not answer as the model that was trained"):
        run.execute()
    with pytest.raises(CheckpointError, match=r"no finished run: it lacks metrics\.json"):
        TrainedRun.load(tmp_path / "run")


def test_texts_with_every_kind_of_line_break_come_back_as_they_were(tmp_path):
    texts = ["a\rb", "c\nd", "e\r\nf", '"g"', "h,i", "\r", " j ", "\u2028k", "\x0bl"]
    write_csv(tmp_path / "rows.csv", ["text", "n,"], [(text, i) for i, text in enumerate(texts)])
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        content = file.read()
    assert next(csv.reader(content.splitlines(keepends=True))) == ["text", "n,"]
    assert [row["text"] for row in read_csv(tmp_path / "rows.csv").rows] == texts
    assert content.endswith("\x0bl,8\n")
