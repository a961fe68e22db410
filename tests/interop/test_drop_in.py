"""One user's script, run with each of the two packages: the import line is all that differs."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch.utils.data import Dataset

import afina

from .cases import assert_close, logits, peft_warnings
from .models import TASK, batch, build

PACKAGES = pytest.mark.parametrize("package", [peft, afina], ids=lambda p: p.__name__)


class Rows(Dataset):
    """Rows of one model's batch, several times over."""

    def __init__(self, name: str, times: int = 4):
        self.data, self.times = batch(name, padded=False), times

    def __len__(self) -> int:
        return self.times * len(self.data["labels"])

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {k: v[i % len(v)] for k, v in self.data.items()}


def arguments(folder: Path, **options: Any) -> tf.TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "seed": 3, "dataloader_pin_memory": False,
    }  # fmt: skip
    return tf.TrainingArguments(str(folder), **{**defaults, **options})


def losses(trainer: tf.Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@PACKAGES
def test_a_whole_script(package: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("gpt2").save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base, "gpt2")
    config = package.LoraConfig(
        task_type=package.TaskType.CAUSAL_LM, r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["c_attn"], bias="none"
    )
    with peft_warnings():
        model = package.get_peft_model(base, config)
        assert isinstance(model, package.PeftModel)
        assert isinstance(model, package.PeftModelForCausalLM)
        assert model.peft_config["default"].r == 4
        assert model.active_adapter == "default"
        assert model.peft_config["default"].peft_type == package.PeftType.LORA
        model.print_trainable_parameters()
        assert "trainable params: 640 ||" in capsys.readouterr().out
        assert model.get_nb_trainable_parameters()[0] == 640
        assert model.base_model.model is base
        assert model.get_base_model() is base
        assert model.config.n_embd == 20
        assert model.device == torch.device("cpu")

        trainer = tf.Trainer(model, arguments(tmp_path / "run", num_train_epochs=4), train_dataset=Rows("gpt2"))
        trainer.train()
        found = losses(trainer)
        assert found[-1] < found[0]
        trainer.save_model(str(tmp_path / "saved-by-trainer"))
        tuned = logits(model, "gpt2")
        model.save_pretrained(tmp_path / "adapter")
        names = {path.name for path in (tmp_path / "adapter").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names

        assert not torch.allclose(plain, tuned)
        with model.disable_adapter():
            assert torch.equal(logits(model, "gpt2"), plain)
        assert torch.equal(logits(model, "gpt2"), tuned)

        again = package.PeftModel.from_pretrained(
            tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        assert_close(logits(again, "gpt2"), tuned, "output")
        assert not any(p.requires_grad for p in again.parameters())
        auto = package.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert_close(logits(auto, "gpt2"), tuned, "output")
        auto = package.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
        assert auto.get_nb_trainable_parameters()[0] == 640
        read = package.PeftConfig.from_pretrained(tmp_path / "adapter")
        assert isinstance(read, package.LoraConfig)
        assert (read.r, read.lora_alpha, read.base_model_name_or_path) == (4, 16, str(tmp_path / "base"))

        model.add_adapter("second", package.LoraConfig(r=3, target_modules=["c_proj"], init_lora_weights=False))
        model.set_adapter("second")
        assert model.active_adapter == "second"
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all("second" in n for n in trained)
        other = logits(model, "gpt2")
        assert not torch.allclose(other, tuned)
        model.load_adapter(tmp_path / "adapter", adapter_name="third")
        model.set_adapter("third")
        assert_close(logits(model, "gpt2"), tuned, "output")
        model.delete_adapter("third")
        assert set(model.peft_config) == {"default", "second"}
        model.set_adapter("default")
        assert_close(logits(model, "gpt2"), tuned, "output")

        state = package.get_peft_model_state_dict(model)
        assert len(state) == 4
        assert all(k.startswith("base_model.model.transformer.h.") and "default" not in k for k in state)
        zeros = {k: torch.zeros_like(v) for k, v in state.items()}
        kept = {k: v.clone() for k, v in state.items()}
        package.set_peft_model_state_dict(model, zeros)
        assert_close(logits(model, "gpt2"), plain, "output")
        package.set_peft_model_state_dict(model, kept)

        ids = batch("gpt2")["input_ids"][:, :4]
        text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        model.merge_adapter()
        assert_close(logits(model, "gpt2"), tuned, "output")
        model.unmerge_adapter()
        assert_close(logits(model, "gpt2"), tuned, "output")
        merged = model.merge_and_unload()
        assert isinstance(merged, tf.GPT2LMHeadModel)
        assert not any("lora" in n or "adapters" in n for n, _ in merged.named_parameters())
        assert_close(logits(merged, "gpt2"), tuned, "output")
        assert torch.equal(
            merged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False), text
        )
        merged.save_pretrained(tmp_path / "merged")
        whole = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_close(logits(whole, "gpt2"), tuned, "output")


@PACKAGES
def test_an_adapter_without_a_task_finds_the_class_of_its_base(package: Any, tmp_path: Path) -> None:
    build("vit").save_pretrained(tmp_path / "base")
    base = tf.ViTForImageClassification.from_pretrained(tmp_path / "base")
    config = package.LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"], init_lora_weights=False)
    with peft_warnings():
        model = package.get_peft_model(base, config)
        model.save_pretrained(tmp_path / "adapter")
        auto = package.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert isinstance(auto.get_base_model(), tf.ViTForImageClassification)
    assert_close(logits(auto, "vit"), logits(model, "vit"), "output")


@PACKAGES
def test_injecting_without_a_wrapper(package: Any) -> None:
    model = build("llama")
    plain = logits(model, "llama")
    config = package.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    with peft_warnings():
        same = package.inject_adapter_in_model(config, model)
    assert same is model
    assert isinstance(model, tf.LlamaForCausalLM)
    assert torch.equal(logits(model, "llama"), plain)
    state = package.get_peft_model_state_dict(model)
    assert len(state) == 8
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(t.numel() for t in state.values())
    values = {k: torch.full_like(v, 0.1) for k, v in state.items()}
    package.set_peft_model_state_dict(model, values)
    assert not torch.allclose(logits(model, "llama"), plain)


@PACKAGES
def test_several_adapters_in_one_batch_and_combined(package: Any) -> None:
    with peft_warnings():
        model = package.get_peft_model(build("llama"), package.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        model.add_adapter("b", package.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        alone = {}
        for name in ("default", "b"):
            model.set_adapter(name)
            alone[name] = logits(model, "llama")
        with model.disable_adapter():
            alone["__base__"] = logits(model, "llama")
        seen = batch("llama")["attention_mask"].unsqueeze(-1)
        names = ["b", "__base__", "default"]
        model.eval()
        with torch.no_grad():
            mixed = model(**batch("llama"), adapter_names=names)["logits"]
        for row, name in enumerate(names):
            assert_close(mixed[row] * seen[row], alone[name][row], "output")
        model.set_adapter("b")
        model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="cat")
        model.add_weighted_adapter(["default", "b"], [0.3, 0.7], "sum", combination_type="cat")
        model.set_adapter("copy")
        assert_close(logits(model, "llama"), alone["default"], "output", 2e-5)
        model.set_adapter("sum")
        sums = logits(model, "llama")
        with torch.no_grad():
            model.set_adapter("default")
            deltas = {n: p for n, p in model.named_parameters() if ".lora_" in n}
            assert deltas
        model.set_adapter("sum")
        merged = model.merge_and_unload()
        assert_close(logits(merged, "llama"), sums, "output", 2e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "PromptTuningConfig": {"num_virtual_tokens": 4},
    "PrefixTuningConfig": {"num_virtual_tokens": 4},
    "PromptEncoderConfig": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "IA3Config": {},
    "LNTuningConfig": {},
    "TrainableTokensConfig": {"token_indices": list(range(3, 30))},
    "LoraConfig": {},
}


@PACKAGES
@pytest.mark.parametrize("config", OPTIONS)
def test_every_method_trains_in_trainer(config: str, package: Any, tmp_path: Path) -> None:
    with peft_warnings():
        model = package.get_peft_model(build("gpt2"), getattr(package, config)(task_type=TASK["gpt2"], **OPTIONS[config]))
        trainer = tf.Trainer(model, arguments(tmp_path, num_train_epochs=6), train_dataset=Rows("gpt2"))
        trainer.train()
        model.save_pretrained(tmp_path / "saved")
        found = losses(trainer)
        assert found[-1] < found[0]
        read = package.PeftModel.from_pretrained(build("gpt2"), tmp_path / "saved")
        assert_close(logits(read, "gpt2"), logits(model, "gpt2"), "output")


# --- the adapted model inside transformers' own Trainer


def prepared(name: str, **options: Any) -> Any:
    config = afina.LoraConfig(task_type=TASK.get(name), r=4, **options)
    return afina.get_peft_model(build(name), config)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}),  # tied embeddings
        ("bert", {}),
        ("t5", {}),
        ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
        ("llama-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama-tied", {"trainable_token_indices": [3, 4, 5]}),
    ],
    ids=str,
)
def test_training_resumes_where_it_stopped(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """T3, T39: a run in two parts gives the losses of the run in one, and evaluation has a loss."""

    def run(folder: str, resume: bool = False, **more: Any) -> tf.Trainer:
        torch.manual_seed(5)
        made = arguments(
            tmp_path / folder, num_train_epochs=2, save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4,
            per_device_eval_batch_size=3, lr_scheduler_type="constant", **more,
        )  # fmt: skip
        trainer = tf.Trainer(prepared(name, **options), made, train_dataset=Rows(name), eval_dataset=Rows(name, 1))
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run("whole")
    assert len(losses(whole)) == 8
    assert all("eval_loss" in row for row in whole.state.log_history if "eval_runtime" in row)
    assert any("eval_loss" in row for row in whole.state.log_history)
    stopped = run("parts", max_steps=4)
    assert len(losses(stopped)) == 4
    size = sum(p.stat().st_size for p in (tmp_path / "parts/checkpoint-4").glob("*.safetensors"))
    base = sum(p.numel() * 4 for p in build(name).parameters())
    assert size < base / 2 or name == "llama-tied", "the frozen base does not belong into a checkpoint"
    resumed = run("parts", resume=True, max_steps=8)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    assert_close(logits(resumed.model, name), logits(whole.model, name), "output")


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    made = arguments(
        tmp_path, num_train_epochs=3, save_strategy="epoch", eval_strategy="epoch", per_device_eval_batch_size=3,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=0.3, save_total_limit=1,
    )  # fmt: skip
    model = prepared("bert")
    trainer = tf.Trainer(model, made, train_dataset=Rows("bert"), eval_dataset=Rows("bert", 1))
    trainer.train()
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 3
    assert trainer.state.best_metric == min(evaluated)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "whisper"])
def test_gradient_checkpointing_in_trainer_changes_nothing(name: str, tmp_path: Path) -> None:
    found = []
    for switch in (False, True):
        torch.manual_seed(5)
        options = {"target_modules": ["q_proj", "v_proj"]} if name in ("vit", "whisper") else {}
        with peft_warnings():
            trainer = tf.Trainer(
                prepared(name, **options),
                arguments(tmp_path, max_steps=4, gradient_checkpointing=switch),
                train_dataset=Rows(name),
            )
            trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] != found[0][0]


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bart", "vit"])
def test_trainer_sees_labels_and_columns_of_the_base(name: str, tmp_path: Path) -> None:
    """T39: found in the forward signature, which a wrapper hides."""
    base = build(name)
    wanted = tf.Trainer(base, arguments(tmp_path))
    wanted._set_signature_columns_if_needed()
    model = prepared(name, **({"target_modules": ["q_proj"]} if name == "vit" else {}))
    trainer = tf.Trainer(model, arguments(tmp_path))
    trainer._set_signature_columns_if_needed()
    assert trainer.label_names == wanted.label_names
    assert trainer._signature_columns == wanted._signature_columns
    assert trainer.model_accepts_loss_kwargs == wanted.model_accepts_loss_kwargs
    assert inspect.signature(type(model).forward) == inspect.signature(type(base).forward)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_accumulating_gradients_gives_the_losses_of_the_large_batch(name: str, tmp_path: Path) -> None:
    """T25 for the models that transformers normalises rightly: adapted ones are no exception."""

    def run(model: Any, steps: int) -> list[float]:
        torch.manual_seed(5)
        made = arguments(
            tmp_path, max_steps=3, per_device_train_batch_size=12 // steps, gradient_accumulation_steps=steps
        )  # fmt: skip
        trainer = tf.Trainer(model, made, train_dataset=Rows(name))
        trainer.train()
        return losses(trainer)

    start = prepared(name)
    whole, accumulated = run(copy.deepcopy(start), 1), run(copy.deepcopy(start), 4)
    assert accumulated == pytest.approx(whole, rel=1e-4)
    assert whole[0] == pytest.approx(run(build(name), 1)[0], rel=1e-5)
