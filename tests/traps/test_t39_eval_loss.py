"""T39: `eval_loss` is missing, because the wrapper hid the signature by which Trainer finds labels and columns."""

import inspect

import pytest
import torch
import transformers as tf
from transformers import Trainer, TrainingArguments
from trap_models import bert, gpt2, ids, llama, vit

from afina import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model


def columns(model):
    """What Trainer finds out about a model."""
    from transformers.utils.generic import can_return_loss, find_labels

    return find_labels(type(model)), can_return_loss(type(model)), list(inspect.signature(model.forward).parameters)


MODELS = {
    "bert": bert,
    "gpt2": lambda: gpt2(tf.GPT2ForSequenceClassification, num_labels=3),
    "llama tokens": lambda: llama(tf.LlamaForTokenClassification, num_labels=3),
    "bert answers": lambda: bert(tf.BertForQuestionAnswering, num_labels=2),
    "vit": vit,
}


@pytest.mark.parametrize("name", MODELS)
def test_t39_labels_and_columns_are_the_base_models(name):
    base = MODELS[name]()
    wanted = columns(base)
    model = get_peft_model(base, LoraConfig(r=2))
    found = columns(model)
    assert set(wanted[2]) <= set(found[2])
    if name != "bert answers":
        assert found[:2] == wanted[:2]
    model = get_peft_model(MODELS[name](), LoraConfig(r=2, task_type="QUESTION_ANS" if "answers" in name else "SEQ_CLS"))
    assert columns(model)[0] == wanted[0]
    assert wanted[0]


class Hidden(torch.nn.Module):
    """A wrapper as it is commonly written."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def test_t39_the_naive_way_hides_them():
    assert columns(Hidden(bert()))[0] == []


class Rows(torch.utils.data.Dataset):
    def __init__(self, name):
        self.name = name

    def __len__(self):
        return 10

    def __getitem__(self, i):
        row = ids(1, 6, seed=i)[0]
        if self.name == "bert answers":
            return {
                "input_ids": row,
                "start_positions": torch.tensor(i % 6),
                "end_positions": torch.tensor(5),
                "text": "not a column",
            }
        if self.name == "vit":
            return {"pixel_values": torch.randn(3, 14, 14), "labels": torch.tensor(i % 3), "text": "not a column"}
        labels = torch.tensor(i % 3) if name_of_rows(self.name) else row % 3
        return {"input_ids": row, "labels": labels, "text": "not a column"}


def name_of_rows(name):
    return name in ("bert", "gpt2")


def run(model, name, folder, **options):
    args = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=0.01,
        **options,
    )
    trainer = Trainer(model, args, train_dataset=Rows(name), eval_dataset=Rows(name))
    trainer.train()
    return trainer, [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]


@pytest.mark.parametrize("config", [LoraConfig, PromptTuningConfig])
@pytest.mark.parametrize("name", MODELS)
def test_t39_trainer_gives_an_eval_loss(name, config, tmp_path):
    task = {"llama tokens": "TOKEN_CLS", "bert answers": "QUESTION_ANS"}.get(name, "SEQ_CLS")
    if name == "vit" and config is PromptTuningConfig:
        pytest.skip("pictures take no virtual tokens")
    options = {"num_virtual_tokens": 3} if config is PromptTuningConfig else {"r": 2}
    trainer, losses = run(get_peft_model(MODELS[name](), config(task_type=task, **options)), name, tmp_path)
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    output = trainer.predict(Rows(name))
    assert len(output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions) == 10


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_t39_the_loss_is_that_of_the_same_model_unwrapped(name, tmp_path):
    """Before training a LoRA is the identity: Trainer's eval loss equals the base's, also after save and load."""

    def evaluate(model):
        args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
        return Trainer(model, args, eval_dataset=Rows(name)).evaluate()["eval_loss"]

    want = evaluate(MODELS[name]())
    model = get_peft_model(MODELS[name](), LoraConfig(r=2, task_type="SEQ_CLS"))
    assert evaluate(model) == pytest.approx(want, rel=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    assert evaluate(PeftModel.from_pretrained(MODELS[name](), tmp_path / "adapter")) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_t39_accumulation_is_asked_of_the_base(name):
    """Trainer divides the loss itself unless the model says that it takes the number of targets."""
    base = MODELS[name]()
    want = getattr(
        base,
        "accepts_loss_kwargs",
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(type(base).forward).parameters.values()),
    )
    assert get_peft_model(base, LoraConfig(r=2)).accepts_loss_kwargs == want


def test_t39_evaluation_under_a_padding_collator(tmp_path):
    """Columns that forward does not know are dropped, those it knows are kept."""
    model = get_peft_model(bert(), LoraConfig(r=2, task_type="SEQ_CLS"))
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(model, args, eval_dataset=Rows("bert"))
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= set(trainer._signature_columns)
    assert "text" not in trainer._signature_columns
