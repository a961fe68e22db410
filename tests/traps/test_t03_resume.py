"""T3: a resumed run must continue the adapter that was saved, not a fresh one."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from trap_models import gpt2, ids, llama, stir, trainable

from afina import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from afina.errors import AfinaError, CheckpointError


def config():
    return LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def train(model, steps, seed=0):
    """Losses of a few steps on fixed data."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
    losses = []
    for step in range(steps):
        batch = ids(4, 9, seed=seed + step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_t03_the_first_loss_after_resume_continues(how, tmp_path):
    whole = get_peft_model(llama(), config())
    start = {k: v.clone() for k, v in whole.state_dict().items()}
    losses = train(whole, 8)
    first = get_peft_model(llama(), config())
    first.load_state_dict(start, strict=False)
    assert train(first, 4) == losses[:4]
    first.save_pretrained(tmp_path)
    if how == "from_pretrained":
        resumed = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    else:
        resumed = get_peft_model(llama(), config(), adapter_name="fresh")
        resumed.load_adapter(tmp_path, "resumed", is_trainable=True)
        resumed.set_adapter("resumed")
    assert trainable(resumed)
    assert train(resumed, 4, seed=4) == losses[4:]
    # what users saw instead: the loss of a fresh adapter
    fresh = get_peft_model(llama(), config())
    fresh.load_state_dict(start, strict=False)
    assert train(fresh, 1, seed=4) != losses[4:5]


PROMPTS = {
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix network": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, task_type="CAUSAL_LM"),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=11, task_type="CAUSAL_LM"),
    "p-tuning LSTM": PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=11, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM"
    ),
    "head": LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_t03_every_kind_of_adapter_resumes(name, tmp_path):
    """Also the networks behind prompts, of which PEFT keeps the output alone."""
    first = get_peft_model(llama(), PROMPTS[name])
    train(first, 3)
    first.save_pretrained(tmp_path)
    want = train(first, 3, seed=3)
    resumed = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert train(resumed, 3, seed=3) == pytest.approx(want, rel=1e-6)
    assert want[0] != want[1] != want[2]


def test_t03_loaded_frozen_it_says_how_to_train(tmp_path):
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(llama(), tmp_path)
    assert trainable(frozen) == []
    assert not frozen.training
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert all(".adapters.default." in n for n in trainable(again))
    assert again.training


class Rows(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        row = ids(1, 6, seed=i)[0]
        return {"input_ids": row, "labels": row}


def trainer(model, folder, steps, **options):
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=3, learning_rate=0.05, report_to=[], use_cpu=True,
        logging_steps=1, save_steps=4, lr_scheduler_type="constant", disable_tqdm=True, seed=3, **options,
    )  # fmt: skip
    return Trainer(model, args, train_dataset=Rows())


def logged(trained):
    return [(line["step"], line["loss"]) for line in trained.state.log_history if "loss" in line]


TIED = LoraConfig(
    r=3, target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True, task_type="CAUSAL_LM", lora_alpha=12
)


@pytest.mark.parametrize(
    ("base", "options"),
    [(llama, config()), (gpt2, TIED)],
    ids=["plain", "tied"],
)
def test_t03_trainer_resumes(base, options, tmp_path):
    def model():
        torch.manual_seed(1)
        return get_peft_model(base(), options)

    whole = trainer(model(), tmp_path / "whole", 8)
    whole.train()
    trainer(model(), tmp_path / "cut", 4).train()
    resumed = trainer(model(), tmp_path / "cut", 8)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logged(whole)
    assert len(logged(whole)) == 8
    assert {k: v.tolist() for k, v in resumed.model.state_dict().items()} == {
        k: v.tolist() for k, v in whole.model.state_dict().items()
    }


def test_t03_a_trainer_checkpoint_given_as_an_adapter_says_what_it_is(tmp_path):
    trainer(get_peft_model(llama(), config()), tmp_path, 4).train()
    folder = tmp_path / "checkpoint-4"
    with pytest.raises(AfinaError, match="resume_from_checkpoint") as error:
        PeftModel.from_pretrained(llama(), folder)
    assert isinstance(error.value, CheckpointError)
    assert "adapter_config.json" in str(error.value)
    assert "save_pretrained" in str(error.value)


def test_t03_resuming_with_another_adapter_is_an_error(tmp_path):
    trainer(get_peft_model(llama(), config()), tmp_path, 4).train()
    other = get_peft_model(llama(), LoraConfig(r=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(other, tmp_path, 8).train(resume_from_checkpoint=True)


def test_t03_resuming_with_other_targets_is_an_error(tmp_path):
    trainer(get_peft_model(llama(), config()), tmp_path, 4).train()
    other = get_peft_model(llama(), LoraConfig(r=3, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(CheckpointError, match="k_proj"):
        trainer(stir(other), tmp_path, 8).train(resume_from_checkpoint=True)


def test_t03_trainer_ends_with_the_best_checkpoint(tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(llama(), config())
    args = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=3,
        learning_rate=0.5,
        report_to=[],
        use_cpu=True,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        disable_tqdm=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        lr_scheduler_type="constant",
    )
    trained = Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows())
    trained.train()
    losses = [line["eval_loss"] for line in trained.state.log_history if "eval_loss" in line]
    assert len(set(losses)) == 3
    assert trained.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)
