"""DreamBooth on small random pipelines of each family: it learns, diffusers draws the same with it, files come back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import diffusion_bases as bases
import pytest
import torch
from typer.testing import CliRunner

from afina.diffusion.factors import DIFFUSERS_NAME, Factors, factors_of_adapter, from_diffusers, read_factors, to_diffusers
from afina.diffusion.kohya import from_kohya, kohya_names, to_kohya
from afina.diffusion.outline import layers_per_block, shapes_of
from afina.diffusion.pipelines import pipeline_config
from afina.errors import ConfigError, DataError
from afina.training.plan import planner_for
from afina.training.recipe import DataOptions, MemoryOptions, Recipe, TrainingOptions
from afina.training.run import prepare
from afina.training.trained import TrainedRun

pytest.importorskip("diffusers", reason="needs afina[diffusion]")
pytest.importorskip("peft", reason="diffusers loads adapters by peft")
pytestmark = [pytest.mark.xdist_group("dreambooth"), pytest.mark.filterwarnings("ignore")]  # of diffusers' own imports


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dreambooth")
    bases.write_pictures(folder / "dog", 3)
    bases.write_pictures(folder / "class", 5, seed=1)
    return folder


def recipe_of(place, family="sd", method=None, training=None, **task):
    of_class = {"class_prompt": "a photo of dog", "class_folder": str(place / "class")}
    options = {"instance_prompt": "a photo of sks dog", **of_class,
               "show_pictures": 0, **task}  # fmt: skip
    if family in ("sd3", "flux"):
        options |= {"text_tokens": 29, "resolution": bases.SIDE}
    return Recipe(
        task={"name": "dreambooth", **options},
        model=str(bases.pipeline_folder(family, place)),
        data=DataOptions(file=str(place / "dog")),
        method=method or {"name": "lora", "r": 3, "lora_alpha": 5},
        training=TrainingOptions(
            **{"epochs": 2, "batch_size": 2, "learning_rate": 2e-2, "precision": "fp32", **(training or {})}
        ),
    )


@pytest.fixture(scope="module", params=bases.FAMILIES)
def done(request, place):
    """A run of a family; SDXL with its text encoders."""
    recipe = recipe_of(place, request.param, text_encoders=request.param == "sdxl", show_pictures=1, show_steps=2)
    run = prepare(recipe, place / "runs" / request.param)
    return request.param, run, run.execute()


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def drawn(pipeline):
    made = pipeline("a photo of sks dog", num_inference_steps=2, height=bases.SIDE, width=bases.SIDE, output_type="np",
                    generator=torch.Generator().manual_seed(3))  # fmt: skip
    return torch.from_numpy(made.images[0])


def whole(family, place, **parts):
    import diffusers

    folder = bases.pipeline_folder(family, place)
    pipeline = (
        diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None, **parts)
        if family == "sd"
        else (diffusers.DiffusionPipeline.from_pretrained(folder, **parts))
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_loss_falls(done):
    _, _, metrics = done
    assert metrics["test"]["loss"] < metrics["baselines"]["untuned"]["loss"] * 0.995


def test_t46_diffusers_draws_the_same_picture(done, place):
    family, run, metrics = done
    assert "not_in_diffusers" not in metrics, metrics["not_in_diffusers"]
    assert metrics["diffusers"]["largest_difference"] < 1e-4
    trained = TrainedRun.load(run.output)
    base = trained.model.get_base_model()
    ours = drawn(whole(family, place, **{name: getattr(base, name) for name in (base.config.family.core, *base.texts)}))
    theirs = whole(family, place)
    before = drawn(theirs)
    theirs.load_lora_weights(run.output / "adapter")
    assert float((drawn(theirs) - ours).abs().max()) < 1e-4
    assert float((before - ours).abs().max()) > 1e-2


def test_pictures_before_and_after_are_in_the_report(done):
    _, run, metrics = done
    (shown,) = metrics["pictures"]
    assert (run.output / shown["before"]).read_bytes() != (run.output / shown["after"]).read_bytes()
    page = (run.output / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2
    assert "No picture is held out" in page


def anything(shapes, chance, family):
    """Random factors for every layer that has a name in Kohya's files; parts of one layer there have one rank."""
    made = {}
    names = kohya_names(family, shapes, 1)
    for i, paths in enumerate(names.values()):
        rank = 2 + i % 3
        for path in paths[: len(paths) if i % 2 else 1]:
            out, inside, *kernel = shapes[path]
            down = torch.randn(rank, inside, *kernel, generator=chance)
            made[path] = Factors(down, torch.randn(out, rank, *(1 for _ in kernel), generator=chance), float(1 + i % 5))
    return made


@pytest.mark.parametrize("family", bases.FAMILIES)
def test_kohyas_form_comes_back_bit_equal(family, place, tmp_path):
    """Convolutions, text encoders, layers that are one there; alphas of their own."""
    config = pipeline_config(str(bases.pipeline_folder(family, place)))
    shapes, layers = shapes_of(config), layers_per_block(config)
    ours = anything(shapes, torch.Generator().manual_seed(0), config.family)
    written, metadata = to_kohya(ours, config.family, shapes, layers)
    again = from_kohya(written, config.family, shapes, layers)
    assert again.keys() == ours.keys()
    for path, own in ours.items():
        assert torch.equal(again[path].down, own.down), path
        assert torch.equal(again[path].up, own.up), path
        assert again[path].alpha == own.alpha, path
    twice, other = to_kohya(again, config.family, shapes, layers)
    assert metadata == other
    assert twice.keys() == written.keys()
    assert all(torch.equal(twice[key], tensor) for key, tensor in written.items())


def test_sdxl_has_the_names_of_kohyas_scripts(place):
    config = pipeline_config(str(bases.pipeline_folder("sdxl", place)))
    names = kohya_names(config.family, shapes_of(config), layers_per_block(config))
    path = {paths[0]: name for name, paths in names.items()}
    assert path["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"] == (
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
    )
    assert path["unet.up_blocks.0.resnets.1.conv1"] == "lora_unet_output_blocks_1_0_in_layers_2"
    assert path["unet.up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_1_2_conv"
    assert path["unet.mid_block.resnets.1.time_emb_proj"] == "lora_unet_middle_block_2_emb_layers_1"
    assert "lora_te2_text_model_encoder_layers_1_mlp_fc1" in names


def test_dense_parts_of_one_layer_are_taken_apart_too(place):
    config = pipeline_config(str(bases.pipeline_folder("flux", place)))
    shapes = shapes_of(config)
    down, up = torch.randn(3, 32), torch.randn(96, 3)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    made = from_kohya({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, config.family, shapes, 0)
    added = torch.cat([own.alpha / own.rank * own.up @ own.down for own in made.values()])
    assert torch.allclose(added, up @ down)
    assert [path.rsplit("to_")[-1] for path in made] == ["q", "k", "v"]


def test_an_adapter_is_exported_and_converted(done, place, tmp_path):
    """Both forms from the run; each becomes the other, and a folder of afina again, with the same factors."""
    from afina.cli.main import app

    family, run, _ = done
    if family not in ("sdxl", "flux"):
        pytest.skip("the others are in these two: text encoders and names of blocks, layers that are one")
    ours = factors_of_adapter(run.output / "adapter")
    config = pipeline_config(run.recipe.model)
    runner = CliRunner()
    for form in ("diffusers", "kohya"):
        asked = runner.invoke(app, ["export", str(run.output), "--format", form, "--output", str(tmp_path / form)])
        assert asked.exit_code == 0, asked.output
        (file,) = (tmp_path / form).glob("*.safetensors")
        made = [
            "export",
            str(file),
            "--format",
            "adapter",
            "--model",
            run.recipe.model,
            "--output",
            str(tmp_path / form / "adapter"),
        ]
        asked = runner.invoke(app, made)
        assert asked.exit_code == 0, asked.output
        back = factors_of_adapter(tmp_path / form / "adapter")
        assert back.keys() == ours.keys()
        for path, own in ours.items():
            added = [f.alpha / f.rank * f.up.flatten(1) @ f.down.flatten(1) for f in (own, back[path])]
            assert torch.allclose(*added, atol=1e-6), path
    kohya = read_factors(next((tmp_path / "kohya").glob("*.safetensors")), shapes_of(config), config.family,
                         layers_per_block(config))  # fmt: skip
    assert all(torch.equal(kohya[p].down, f.down) and torch.equal(kohya[p].up, f.up) for p, f in ours.items())
    if family in ("sd", "sdxl"):
        theirs = [whole(family, place), whole(family, place)]
        theirs[0].load_lora_weights(run.output / "adapter")
        theirs[1].load_lora_weights(tmp_path / "kohya", weight_name="kohya.safetensors")
        assert float((drawn(theirs[0]) - drawn(theirs[1])).abs().max()) < 1e-4


def test_scales_are_in_diffusers_factors():
    own = Factors(torch.randn(3, 7), torch.randn(5, 3), 6.0)
    state = to_diffusers({"unet.conv_in": own})
    assert torch.equal(state["unet.conv_in.lora_B.weight"], 2 * own.up)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": 3})}
    assert from_diffusers(state, ["unet.conv_in"], metadata)["unet.conv_in"].alpha == 6.0


@pytest.mark.parametrize(
    ("method", "task", "memory"),
    [
        ({"name": "hra", "r": 2, "target_modules": ["to_q"]}, {"flip": True, "crop": "random"}, {}),
        ({"name": "lora", "r": 2}, {"text_encoders": True}, {"gradient_checkpointing": True}),
        (
            {"name": "lora", "r": 2, "target_modules": ["conv1", "to_v"]},
            {"class_prompt": "", "class_folder": ""},
            {"weights": "bf16"},
        ),
    ],
)
def test_other_ways_train_too(method, task, memory, place, tmp_path):
    """Another method with pictures that change; text encoders with checkpointing; convolutions in 16 bits, no class."""
    recipe = recipe_of(place, method=method, training={"epochs": 1}, **task)
    for key, value in memory.items():
        setattr(recipe.memory, key, value)
    metrics = prepare(recipe, tmp_path / "run").execute()
    assert metrics["read_back"]["largest_difference"] < 1e-4
    assert ("not_in_diffusers" in metrics) == (method["name"] != "lora")


def test_what_was_encoded_once_is_what_is_encoded_in_every_step(place):
    """The same noise over latents from the cache, and from the pictures themselves."""
    found = []
    for cache in ("auto", "off"):
        run = prepare(recipe_of(place, cache=cache), None, trial=True)
        batch = run.task.collate([run.task.ready(f, "a chance") for f in run.rows["train"].features[:3]])
        assert ("moments" in batch) == (cache == "auto")
        with torch.no_grad():
            found.append(float(run.task.loss_sum(run.model.eval(), batch)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_stable_diffusion_15_of_true_size_is_planned_below_11_gb(tmp_path):
    """From its configurations alone: the weights in float32, a step of one picture, blocks computed again."""
    recipe = Recipe(
        task={"name": "dreambooth", "instance_prompt": "a photo of sks dog"},
        model=str(bases.save_true_sd15(tmp_path)),
        training=TrainingOptions(batch_size=1, evaluation_batch_size=1),
        memory=MemoryOptions(gradient_checkpointing=True, weights="fp32"),
    )
    planned = planner_for(recipe, "cuda").plan(recipe)
    weights = planned.moments["train"].device["weights fp32"]
    assert weights == 4 * 859_520_964
    assert weights < planned.total < 8.12e9  # which is what PEFT publishes for it


# --- what a newcomer gets wrong


def test_what_is_wrong_is_told_together(place, tmp_path):
    (tmp_path / "empty").mkdir()
    recipe = recipe_of(place, instance_prompt="", class_folder="")
    recipe.data.file = str(tmp_path / "empty")
    with pytest.raises(ConfigError) as raised:
        prepare(recipe, tmp_path / "run")
    said = str(raised.value)
    for part in ("instance_prompt is missing", "class_folder is missing", "has no picture"):
        assert part in said
    with pytest.raises(ConfigError, match="changes from step to step"):
        prepare(recipe_of(place, cache="on", flip=True), tmp_path / "run")


def test_a_broken_picture_is_named(place, tmp_path):
    shutil.copytree(place / "dog", tmp_path / "dog")
    whole_file = (tmp_path / "dog" / "01.png").read_bytes()
    (tmp_path / "dog" / "01.png").write_bytes(whole_file[: len(whole_file) // 2])
    recipe = recipe_of(place)
    recipe.data.file = str(tmp_path / "dog")
    with pytest.raises(DataError, match=r"01\.png"):
        prepare(recipe, tmp_path / "run")


def test_another_kind_of_pipeline_is_refused(place, tmp_path):
    shutil.copytree(bases.pipeline_folder("sd", place), tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionUpscalePipeline"))
    recipe = recipe_of(place)
    recipe.model = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="afina does not train"):
        prepare(recipe, tmp_path / "run")
    recipe.task = {"name": "sequence_classification"}
    with pytest.raises(ConfigError, match="pipeline of diffusers; a model of transformers is expected"):
        prepare(recipe, tmp_path / "run")


# --- the command


def test_the_command_makes_pictures_of_the_class(place, tmp_path, monkeypatch):
    from afina.cli.main import app

    monkeypatch.setattr(sys, "argv", ["afina"])
    asked = CliRunner().invoke(app, [
        "dreambooth", "--data", str(place / "dog"), "--prompt", "a photo of sks dog", "--class-prompt", "a photo of dog",
        "--class-pictures", "2", "--model", str(bases.pipeline_folder("sd", place)),
        "--output", str(tmp_path / "runs" / "dog"),
        "--steps", "6", "task.show_steps=2", "task.show_pictures=1", "--quiet", "r=2",
    ])  # fmt: skip
    assert asked.exit_code == 0, asked.output
    (folder,) = (tmp_path / "runs" / "class_pictures").iterdir()
    assert len(list(folder.glob("*.png"))) == 2
    assert len(losses(tmp_path / "runs" / "dog")) == 6
    assert (tmp_path / "runs" / "dog" / "adapter" / DIFFUSERS_NAME).is_file()
    Path(folder / "0001.png").unlink()
    before = (folder / "0000.png").read_bytes()
    from afina.diffusion.class_pictures import write_class_pictures

    write_class_pictures(
        str(bases.pipeline_folder("sd", place)), "a photo of dog", folder, 2, steps=2, size=None, weights="fp32"
    )
    assert (folder / "0000.png").read_bytes() == before
    assert (folder / "0001.png").is_file()
