"""Runs of a sweep learn what each of them learns alone."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from document_bases import SIZE, form, save_base
from language_bases import save
from sound_bases import save_wav2vec2_ctc, write_transcripts
from tiny_bases import save_bert, save_gpt2, write_rows

from afina.core.files import read_weights
from afina.errors import TrainingError
from afina.fast.trunk import Trunk
from afina.sweep import joined
from afina.sweep.common import Common, _sum
from afina.sweep.points import Point, best_of, results_of
from afina.sweep.sweep import check_points, train_points
from afina.training.recipe import DataOptions, Recipe, TrainingOptions
from afina.training.run import prepare

LORA = {"name": "lora", "r": 3, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return {
        "bert": (str(save_bert(folder / "bert")), str(write_rows(folder / "rows.csv", 47)), "sequence_classification"),
        "gpt2": (str(save_gpt2(folder / "gpt2")), str(folder / "rows.csv"), "sequence_classification"),
    }


def recipe_of(base, method=None, **options):
    model, file, task = base
    options = {"epochs": 2, "batch_size": 7, "learning_rate": 5e-3, "precision": "fp32", **options}
    data = DataOptions(file=file, text="message", label="label")
    training = TrainingOptions(**options)
    return Recipe(model=model, task={"name": task}, data=data, method=dict(method or LORA), training=training)


def points_of(base, *changes):
    """A point for each change: options of training, or of the method under "method"."""
    made = []
    for number, change in enumerate(changes, 1):
        options = {k: v for k, v in change.items() if k != "method"}
        method = {**LORA, **change.get("method", {})}
        made.append(Point(number, {k: str(v) for k, v in change.items()}, recipe_of(base, method, **options)))
    return made


def swept(folder, points, together=None, **how):
    common, said, results = Common(), [], {}
    groups, _, notes = check_points(points, common)
    train_points(
        folder, len(points), groups, common, together=together, say=said.append,
        over=lambda point, result: results.update({point.number: result}), **how,
    )  # fmt: skip
    return results, said, notes


def weights_in(folder):
    return read_weights(folder / "adapter" / "adapter_model.safetensors")


def losses_in(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def run_alone(tmp_path_factory):
    """Folder and metrics of a recipe's run by itself, made once for all tests that compare with it."""
    known = {}

    def run(recipe):
        key = recipe.to_yaml()
        if key not in known:
            folder = tmp_path_factory.mktemp("alone") / "run"
            known[key] = folder, prepare(copy.deepcopy(recipe), folder).execute()
        return known[key]

    return run


def compare(run_alone, tmp_path, points):
    for point in points:
        alone, metrics = run_alone(point.recipe)
        folder = point.folder(tmp_path / "sweep", len(points))
        assert losses_in(folder) == pytest.approx(losses_in(alone), rel=1e-4, abs=1e-6)
        own, expected = weights_in(folder), weights_in(alone)
        assert own.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(own[name], weight, rtol=1e-2, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")
        found = json.loads((folder / "metrics.json").read_text())
        assert found["test"]["loss"] == pytest.approx(metrics["test"]["loss"], rel=1e-3)
        assert found["train"]["best_epoch"] == metrics["train"]["best_epoch"]


@pytest.mark.parametrize("base", ["bert", "gpt2"])
def test_runs_in_one_pass_learn_what_they_learn_alone(bases, tmp_path, base, run_alone):
    """Ranks, rates, schedules, orders of rows, numbers of steps and of rows a step may all differ."""
    points = points_of(
        bases[base], {"epochs": 1}, {"learning_rate": 1e-2, "schedule": "cosine"},
        {"method": {"r": 5, "lora_alpha": 3}, "batch_size": 5, "seed": 1, "epochs": 1, "weight_decay": 0.1},
        {"label_smoothing": 0.1, "method": {"use_dora": True}},
    )[: 4 if base == "bert" else 3]  # fmt: skip
    results, said, notes = swept(tmp_path / "sweep", points, together=4)
    assert all(isinstance(result, dict) for result in results.values())
    assert f"points 1 to {len(points)}: together" in " ".join(said)
    assert results[1]["train"]["together"] == len(points)
    assert "in 2 ways (the seed divides them too)" in " ".join(notes)
    compare(run_alone, tmp_path, points)


def test_last_blocks_share_a_trunk_one_after_another(bases, tmp_path, monkeypatch, run_alone):
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    last = {"name": "last_layers", "num_layers": 1}
    points = [Point(i, {"learning_rate": str(rate)}, recipe_of(bases["bert"], last, learning_rate=rate))
              for i, rate in enumerate((1e-3, 5e-3), 1)]  # fmt: skip
    tried = []
    fits = Trunk.fits
    monkeypatch.setattr(Trunk, "fits", lambda self, *rest: tried.append(self) or fits(self, *rest))
    results, said, _ = swept(tmp_path / "sweep", points)
    assert len(tried) == 2  # once to learn and once to read the test rows, for both runs
    assert "copies of whole modules" in " ".join(said)
    assert "in a run before" in " ".join(results[2]["train"]["notes"])
    compare(run_alone, tmp_path, points)


@pytest.mark.parametrize("letters", [None, "13w"])
def test_a_task_knows_of_a_shared_base_what_it_knows_of_its_own(tmp_path, run_alone, letters):
    """What it learns while the base is loaded (the windows of its convolutions, whether its letters are new), and so again
    when the adapter is read back."""
    base = save_wav2vec2_ctc(tmp_path / "base", "group", letters)
    write_transcripts(tmp_path / "rows", 31)
    points = [Point(rank, {"r": str(rank)}, Recipe(
        model=str(base), task={"name": "speech_recognition"}, method={"name": "lora", "r": rank},
        data=DataOptions(file=str(tmp_path / "rows" / "metadata.csv")),
        training=TrainingOptions(epochs=1, batch_size=7, learning_rate=5e-3, precision="fp32"),
    )) for rank in (1, 2)]  # fmt: skip
    results, _, _ = swept(tmp_path / "sweep", points)
    for point in points:
        _, expected = run_alone(point.recipe)
        assert results[point.number]["task"] == expected["task"]
        assert results[point.number]["baselines"].keys() == expected["baselines"].keys()
    compare(run_alone, tmp_path, points[1:])


@pytest.mark.parametrize("seen", [True, False])
def test_a_base_that_was_written_to_is_loaded_again(bases, seen):
    """An adapter is read back into the base as its files have it, whatever a run has done to the one in memory, and whether
    torch counts such a write or not."""
    run = prepare(recipe_of(bases["bert"]), None, trial=True, shared=(common := Common()))
    path = bases["bert"][0]
    first, second = (common.fresh(run.task, path, run.about) for _ in range(2))
    weights = dict(first.named_parameters())
    shared = [name for name, tensor in second.named_parameters() if tensor is weights[name]]
    assert len(shared) == len(weights)
    name = next(name for name in shared if name.endswith("word_embeddings.weight"))
    before = weights[name].detach().clone()
    with torch.no_grad():
        (weights[name] if seen else weights[name].data)[5, 3] += 1
    assert (weights[name]._version > 0) == seen
    assert torch.equal(common.fresh(run.task, path, run.about).get_parameter(name), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_the_sum_of_a_tensor_tells_any_single_write(dtype):
    """Whatever its type, its size and where in its storage it begins."""
    for shape in ((), (1,), (7,), (3, 5)):
        whole = torch.zeros(math.prod(shape) + 1).to(dtype)
        tensor = whole[1:].view(shape)
        before = _sum(tensor)
        for place in range(tensor.numel()):
            tensor.data.view(-1)[place] = 1
            assert _sum(tensor) != before
            tensor.data.view(-1)[place] = 0
        assert _sum(tensor) == before


def test_rows_are_read_anew_where_an_option_of_the_task_makes_them(tmp_path):
    """Boxes in pixels and in thousandths are other boxes of the same file."""
    chance, rows, common = random.Random(3), [], Common()
    for _ in range(31):
        words, boxes, tags = form(chance)
        rows.append({"words": words, "boxes": boxes, "labels": tags, "page_size": SIZE})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = save_base(tmp_path / "base", "layoutlm")

    def boxes(unit):
        task = {"name": "document_token_classification", "boxes": unit}
        training = TrainingOptions(precision="fp32")
        recipe = Recipe(model=str(base), task=task, data=DataOptions(file=str(file)), method=dict(LORA), training=training)
        run = prepare(recipe, None, trial=True, shared=common)
        return [example.value.boxes for example in run.rows["train"].examples]

    pixels, thousandths = boxes("pixels"), boxes("thousandths")
    assert pixels != thousandths
    assert boxes("pixels") == pixels


def test_new_heads_and_upper_blocks_in_one_pass(bases, tmp_path, monkeypatch, run_alone):
    """The head of each run reads its own rows, and the trunk below all adapters is computed once."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    upper = {"layers_to_transform": [1]}
    points = points_of(bases["bert"], {"method": upper, "epochs": 1}, {"method": upper, "seed": 3})
    results, said, _ = swept(tmp_path / "sweep", points, together=2)
    assert "points 1 to 2: together" in " ".join(said)
    assert all("computed once a row" in " ".join(result["train"]["notes"]) for result in results.values())
    compare(run_alone, tmp_path, points)


def test_a_run_that_is_over_makes_room_on_the_disk_and_the_others_read_on(bases, tmp_path, monkeypatch, run_alone):
    """The states of its test rows take the place of the training rows', which another run has yet to validate with."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path / "cache"))
    upper = {**LORA, "layers_to_transform": [1]}
    run = prepare(recipe_of(bases["bert"], upper), None, trial=True)
    tokens = {side: sum(rows.lengths) for side, rows in run.rows.items()}
    size = run.model.get_base_model().config.hidden_size * 4
    room = {"trunk_cache": f"{(sum(tokens.values()) - tokens['test'] / 2) * size / 1e6:.4f}MB"}
    points = points_of(bases["bert"], {"method": upper, "epochs": 1, **room},
                       {"method": upper, "epochs": 2, "evaluate_every": 2, **room})  # fmt: skip
    results, _, _ = swept(tmp_path / "sweep", points, together=2)
    assert all("computed once a row" in " ".join(result["train"]["notes"]) for result in results.values())
    compare(run_alone, tmp_path, points)


@pytest.mark.parametrize(("task", "architecture"), [("causal_lm", "GPT-2"), ("seq2seq", "T5")])
def test_losses_inside_the_head(tmp_path, task, architecture, run_alone):
    """A vocabulary's loss is computed in chunks inside the head, of each run with its own hidden states."""
    base = save(tmp_path / "base", architecture)
    rows = [{"text": f"say {'abcdefg'[i % 7] * (1 + i % 5)} {i}", "label": f"{i % 3} {'xy' * (i % 4)}z"} for i in range(29)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    points = []
    for number, change in enumerate(({}, {"seed": 2}), 1):
        options = {"epochs": 1, "batch_size": 5, "learning_rate": 5e-3, "precision": "fp32", **change}
        recipe = Recipe(model=str(base), task={"name": task}, data=DataOptions(file=str(file), text="text", label="label"),
                        method=dict(LORA), training=TrainingOptions(**options))  # fmt: skip
        points.append(Point(number, {"n": str(number)}, recipe))
    results, said, _ = swept(tmp_path / "sweep", points, together=2)
    assert "together" in " ".join(said), said
    assert len(results) == 2
    compare(run_alone, tmp_path, points)


def test_t35_what_cannot_share_a_pass_says_why(bases, tmp_path):
    points = points_of(bases["bert"], {"epochs": 1}, {"epochs": 1, "learning_rate": 1e-2})
    prompt = {"name": "prompt_tuning", "num_virtual_tokens": 2}
    points += [Point(i, {"n": str(i)}, recipe_of(bases["bert"], prompt, epochs=1, seed=i)) for i in (3, 4)]
    groups, _, _ = check_points(points, Common())
    assert [group.why == "" for group in groups] == [True, False]
    assert "virtual tokens" in groups[1].why


def test_a_joined_pass_that_differs_is_not_used(bases, tmp_path, monkeypatch):
    losses = joined.JoinedModel.losses
    monkeypatch.setattr(joined.JoinedModel, "losses", lambda self, asked: [loss * 1.1 for loss in losses(self, asked)])
    results, said, _ = swept(tmp_path / "s", points_of(bases["bert"], {"epochs": 1}, {"epochs": 1, "seed": 1}), together=2)
    assert "in one pass p1 had the loss" in " ".join(said)
    assert all("trained by itself in a sweep: in one pass" in " ".join(r["train"]["notes"]) for r in results.values())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_runs_out_halves_the_group(bases, tmp_path, monkeypatch, where, run_alone):
    losses, backward, sizes, whole = joined.JoinedModel.losses, torch.autograd.backward, [], []

    def refuse(size):
        if not whole and size > 2:
            raise torch.OutOfMemoryError("out of memory")

    def fewer(self, asked):
        if torch.is_grad_enabled():
            sizes.append(len(asked))
            if where == "forward":
                refuse(len(asked))
        return losses(self, asked)

    def smaller(tensors, *args, **kwargs):
        if where == "backward" and isinstance(tensors, list):
            refuse(len(tensors))
        return backward(tensors, *args, **kwargs)

    monkeypatch.setattr(joined.JoinedModel, "losses", fewer)
    monkeypatch.setattr(torch.autograd, "backward", smaller)
    points = points_of(bases["bert"], *({"epochs": 1, "learning_rate": rate} for rate in (5e-3, 1e-2, 3e-3, 2e-2)))
    _, said, _ = swept(tmp_path / "sweep", points, together=4)
    assert "memory ran out with 4 runs in a pass; from there on a pass had at most 2" in " ".join(said)
    assert sizes[0] == 4
    assert max(sizes[1:]) == 2
    whole.append(True)
    compare(run_alone, tmp_path, points[:1])


def test_a_run_that_fails_ends_alone_and_the_others_go_on(bases, tmp_path, run_alone):
    points = points_of(bases["bert"], {"epochs": 1}, {"epochs": 1, "learning_rate": 1e30}, {"epochs": 1, "patience": 1})
    results, _, _ = swept(tmp_path / "sweep", points, together=3)
    assert isinstance(results[2], TrainingError)
    found = results_of(tmp_path / "sweep", points)
    assert [one.state for one in found] == ["finished", "failed", "finished"]
    assert "loss is" in found[1].error
    best = best_of(found)
    assert best is max((found[0], found[2]), key=lambda one: one.score)
    compare(run_alone, tmp_path, [points[0]])


def test_a_stopped_sweep_goes_on(bases, tmp_path, monkeypatch, run_alone):
    """A sweep killed after some steps goes on from the checkpoints of its runs, with the losses they would have had."""
    points = points_of(bases["bert"], {"checkpoint_every": 3}, {"learning_rate": 1e-2, "checkpoint_every": 3})
    losses, count = joined.JoinedModel.losses, [0]

    def killed(self, asked):
        count[0] += torch.is_grad_enabled()
        if count[0] == 7:
            raise KeyboardInterrupt
        return losses(self, asked)

    monkeypatch.setattr(joined.JoinedModel, "losses", killed)
    torchs = F.dropout
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "sweep", points, together=2)
    assert F.dropout is torchs  # the runs that waited have given back what they took
    assert [one.state for one in results_of(tmp_path / "sweep", points)] == ["begun", "begun"]
    monkeypatch.undo()
    results, _, _ = swept(tmp_path / "sweep", points, together=2)
    assert len(results) == 2
    compare(run_alone, tmp_path, points[1:])
